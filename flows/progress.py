"""How far a command is: bars on a terminal, plain lines elsewhere; always on the error stream."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 30.0


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


class BarReporter:
    """One bar per task."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

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

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def reporter() -> Reporter:
    """Return bars where the error stream is a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return BarReporter(console) if console.is_terminal else PlainReporter(sys.stderr)
