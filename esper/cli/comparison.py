"""The comparison on the terminal: tables per environment; policies of one algorithm stand as one row."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
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

    def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        console.print(escape(title), soft_wrap=True)
        table = Table(padding=(0, 1))
        for heading in headings:
            table.add_column(escape(heading), justify="left" if heading == headings[0] else "right")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)

    for environment in tables.environments(evaluation):
        grouped = {name for found in tables.algorithms_of(evaluation, environment) for name in found.policies}
        arms = tables.arms_of(evaluation, environment)
        rows = [row for arm, row in zip(arms, tables.full_table(evaluation, environment)) if arm.arm not in grouped]
        show(tables.title(evaluation, environment), tables.headings(evaluation, environment), rows)
        if grouped:
            pooled = tables.algorithm_table(evaluation, environment)
            show(tables.algorithm_title(evaluation, environment), tables.POOLED_HEADINGS, pooled)
        if environment in evaluation.families:
            told = f"{environment}: mean return by member (difference to best-fixed)"
            members = tables.member_table(evaluation, environment)
            show(told, tables.member_headings(evaluation, environment), members)
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
