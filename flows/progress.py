"""How far a command is: bars on a terminal, plain lines elsewhere; always on the error stream."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol, Self, TextIO

import pyarrow as pa
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from esper.karn.progress_table import COUNTS, progress_line, summed

LINE_EVERY_S = 30.0
TABLE_EVERY_S = 1.0

BARS_LINES = 6
"""Lines of a terminal that the table leaves to the bars, its own head and what is written above them."""


class Reporter(Protocol):
    """What flows tell about their progress. Safe to call from several threads."""

    def begin(self, task: str, total: int) -> None:
        """A task of `total` units begins."""
        ...

    def advance(self, task: str, note: str = "") -> None:
        """One unit of a task has ended."""
        ...

    def note(self, task: str, text: str) -> None:
        """Something worth a glance happened within a unit."""
        ...

    def reach(self, task: str, done: int, total: int, text: str) -> None:
        """A task, begun or not, has done `done` of `total` units; `text` says what it has come to, as its losses."""
        ...

    def end(self, task: str) -> None:
        """A task has ended and need not be shown any more."""
        ...

    def table(self, make: Callable[[], pa.Table], *, at_end: bool = False) -> None:
        """How far each cell of a plan is; `make` returns the table of progress and is called where it is shown."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainReporter:
    """One line per finished unit; notes, and what tasks have come to, at most every half minute."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._done: dict[str, tuple[int, int]] = {}
        self._started = time.monotonic()
        self._last_note = self._started
        self._last_reached: dict[str, float] = {}
        self._last_table = self._started

    def begin(self, task: str, total: int) -> None:
        """A task of `total` units begins."""
        with self._lock:
            self._done[task] = (0, total)
            self._write(f"{task}: {total} to do")

    def advance(self, task: str, note: str = "") -> None:
        """One unit of a task has ended."""
        with self._lock:
            done, total = self._done.get(task, (0, 0))
            self._done[task] = (done + 1, max(total, done + 1))
            self._write(f"{task}: {done + 1}/{max(total, done + 1)} {note}".rstrip())

    def note(self, task: str, text: str) -> None:
        """Print the note unless one was printed within the last half minute."""
        with self._lock:
            now = time.monotonic()
            if now - self._last_note >= LINE_EVERY_S:
                self._last_note = now
                self._write(f"{task}: {text}")

    def reach(self, task: str, done: int, total: int, text: str) -> None:
        """Print how far the task is unless that was printed within the last half minute."""
        with self._lock:
            now = time.monotonic()
            if now - self._last_reached.setdefault(task, now) >= LINE_EVERY_S:
                self._last_reached[task] = now
                self._write(f"{task}: {done}/{total} {text}".rstrip())

    def end(self, task: str) -> None:
        """Lines stay where they are."""

    def table(self, make: Callable[[], pa.Table], *, at_end: bool = False) -> None:
        """Print the sums of the table of progress every half minute, and at the end."""
        with self._lock:
            now = time.monotonic()
            if at_end or now - self._last_table >= LINE_EVERY_S:
                self._last_table = now
                self._write(progress_line(make()))

    def _write(self, text: str) -> None:
        elapsed = int(time.monotonic() - self._started)
        self._stream.write(f"[{elapsed // 60:02d}:{elapsed % 60:02d}] {text}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _BarsAndTable(Progress):
    """Bars, and beneath them whatever table there is."""

    beneath: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then the table."""
        yield self.make_tasks_table(self.tasks)
        if self.beneath is not None:
            yield self.beneath


class BarReporter:
    """One bar per task, and beneath them the table of progress."""

    def __init__(self, console: Console) -> None:
        self._progress = _BarsAndTable(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_table = -TABLE_EVERY_S

    def begin(self, task: str, total: int) -> None:
        """A task of `total` units begins."""
        self._tasks[task] = self._progress.add_task(task, total=total, note="")

    def advance(self, task: str, note: str = "") -> None:
        """One unit of a task has ended."""
        if task in self._tasks:
            self._progress.update(self._tasks[task], advance=1, note=note)

    def note(self, task: str, text: str) -> None:
        """Show the note beside the bar."""
        if task in self._tasks:
            self._progress.update(self._tasks[task], note=text)

    def reach(self, task: str, done: int, total: int, text: str) -> None:
        """Move the bar, and show the text beside it."""
        if task not in self._tasks:
            self.begin(task, total)
        self._progress.update(self._tasks[task], completed=done, note=text)

    def end(self, task: str) -> None:
        """Take the bar away."""
        if task in self._tasks:
            self._progress.remove_task(self._tasks.pop(task))

    def table(self, make: Callable[[], pa.Table], *, at_end: bool = False) -> None:
        """Show the table of progress beneath the bars, anew at most every second, as finely as the screen has lines."""
        now = time.monotonic()
        if at_end or now - self._last_table >= TABLE_EVERY_S:
            self._last_table = now
            self._progress.beneath = table_of_progress(make(), self._progress.console.height - BARS_LINES)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def table_of_progress(table: pa.Table, max_rows: int) -> Table:
    """Return planned, done and failed episodes as a table for a terminal, summed until it has few enough rows.

    Args:
        table: The table of progress.
        max_rows: Most rows; a plan whose environments are more than that shows those with most to go.
    """
    levels = (["environment", "controller", "epsilon"], ["environment", "controller"], ["environment"])
    found = next(((keys, rows) for keys in levels if (rows := summed(table, keys)).num_rows <= max_rows), None)
    keys, rows = found or (levels[-1], summed(table, levels[-1]))
    hidden = max(0, rows.num_rows - max(1, max_rows))
    if hidden:
        rows = rows.sort_by([("remaining", "descending")]).slice(0, rows.num_rows - hidden)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=f"and {hidden} more" if hidden else None)
    for name in (*keys, *COUNTS):
        shown.add_column(name, justify="right" if name in COUNTS or name == "epsilon" else "left", no_wrap=True)
    for row in rows.to_pylist():
        style = "red" if row["failed"] else "dim" if not row["remaining"] else None
        shown.add_row(
            *(f"{row[key]:g}" if key == "epsilon" else str(row[key]) for key in (*keys, *COUNTS)), style=style
        )
    return shown


def reporter() -> Reporter:
    """Return bars where the error stream is a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return BarReporter(console) if console.is_terminal else PlainReporter(sys.stderr)
