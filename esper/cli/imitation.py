"""An imitation policy's result on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from esper.leyline.imitation import ImitationResult


def print_imitation(result: ImitationResult) -> None:
    """Print the held-out accuracies, the confusion matrix, and each environment's live comparison."""
    from rich.console import Console
    from rich.markup import escape

    from esper.karn import imitation_table as text

    console = Console(width=max(120, shutil.get_terminal_size((120, 40)).columns), highlight=False)
    console.print("held-out environment seeds")
    console.print(f"  {text.accuracy_line('with a choice', result.choices)}", soft_wrap=True)
    console.print(f"  {text.accuracy_line('all, forced WAITs too', result.all_decisions)}", soft_wrap=True)
    if result.choices.total:
        console.print("\nconfusion matrix, decisions with a choice (rows: decided, columns: predicted)")
        console.print(_table(text.CONFUSION_HEADINGS, text.confusion_rows(result.choices)))
    for live in result.live:
        title = f"\n{result.policy.name} beside {result.heuristic} on {text.live_title(live)}"
        console.print(escape(title), soft_wrap=True)
        console.print(_table(text.LIVE_HEADINGS, text.live_rows(live)))
        console.print("disagreements, by the heuristic's class")
        console.print(_table(text.DISAGREEMENT_HEADINGS, text.disagreement_rows(live)))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(padding=(0, 1))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
