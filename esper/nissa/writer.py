"""Writing telemetry: one append-only JSONL file per process under a run's folder."""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from esper.leyline.errors import StoreError
from esper.leyline.events import Event, EventKind

Sink = Callable[[Event], None]


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class EventWriter:
    """Appends events to `events-<pid>.jsonl` in a run's folder, and hands each to further sinks.

    Each event is one line, on disk when `emit` returns. Safe to use from several threads.
    """

    def __init__(self, folder: Path, run: str, sinks: Sequence[Sink] = ()) -> None:
        self.run = run
        self.path = folder / f"events-{os.getpid()}.jsonl"
        self._sinks = tuple(sinks)
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write events to {self.path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def emit(self, kind: EventKind, data: dict[str, JsonValue] | None = None) -> Event:
        """Record one event and return it."""
        event = Event(kind=kind, time=now(), run=self.run, data=data or {})
        with self._lock:
            self._file.write(event.model_dump_json() + "\n")
            self._file.flush()
            for sink in self._sinks:
                sink(event)
        return event

    def close(self) -> None:
        """Close the file; further events raise ValueError."""
        with self._lock:
            self._file.close()
