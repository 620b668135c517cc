"""The comparison on the terminal: tables per environment; policies of one algorithm stand as one row."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.leyline.comparison import Evaluation


def print_comparison(evaluation: Evaluation) -> None:
    """Print each environment's arms, what the learned ones amount to, and the run's controls."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from esper.karn import comparison_table as tables

    console = Console(width=max(150, shutil.get_terminal_size((170, 40)).columns), highlight=False)

    for environment in tables.environments(evaluation):
        for found in tables.tables_of(evaluation, environment):
            console.print(escape(found.title), soft_wrap=True)
            table = Table(padding=(0, 1))
            for heading in found.headings:
                table.add_column(escape(heading), justify="left" if heading == found.headings[0] else "right")
            for row in found.rows:
                table.add_row(*(escape(cell) for cell in row))
            console.print(table)
        for line in tables.findings(evaluation, environment):
            console.print(f"  {escape(line)}", soft_wrap=True)
        console.print()
    for control in evaluation.controls:
        word = "passed" if control.passed else "FAILED"
        console.print(
            f"control {word}: {control.environment}: {escape(control.name)} = {control.value:.2f} "
            f"(expected {control.low:g} to {control.high:g})",
            soft_wrap=True,
        )
