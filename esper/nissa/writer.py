"""Making events, and writing them: append-only JSONL, one file per process under a run's folder."""

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
from esper.leyline.secrets import mask_json

Sink = Callable[[Event], None]


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class Emitter:
    """Makes events and hands each to its sinks, one at a time. Safe to use from several threads."""

    def __init__(self, run: str, sinks: Sequence[Sink]) -> None:
        self.run = run
        self._sinks = tuple(sinks)
        self._lock = threading.Lock()

    def emit(self, kind: EventKind, data: dict[str, JsonValue] | None = None) -> Event:
        """Hand on one event and return it."""
        masked = {key: mask_json(value) for key, value in (data or {}).items()}
        event = Event(kind=kind, time=now(), run=self.run, data=masked)
        with self._lock:
            for sink in self._sinks:
                sink(event)
        return event


class FileSink:
    """Appends events to a JSONL file: each is one line, on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write events to {path}: {error.strerror}") from None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further events raise ValueError."""
        self._file.close()


class EventWriter(Emitter):
    """Appends events to `events-<pid>.jsonl` in a run's folder, and hands each to further sinks."""

    def __init__(self, folder: Path, run: str, sinks: Sequence[Sink] = ()) -> None:
        self._file = FileSink(folder / f"events-{os.getpid()}.jsonl")
        self.path = self._file.path
        super().__init__(run, (self._file, *sinks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; further events raise ValueError."""
        with self._lock:
            self._file.close()
