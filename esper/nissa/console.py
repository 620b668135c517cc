"""Events as plain lines."""

from __future__ import annotations

from typing import TextIO

from pydantic import JsonValue

from esper.leyline.events import Event


def _short(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_event(event: Event) -> str:
    """Return an event as one line: time of day, kind, and its data as key=value."""
    data = " ".join(f"{key}={_short(value)}" for key, value in event.data.items())
    return f"{event.time[11:19]} {event.kind.value} {data}".rstrip()


class ConsoleSink:
    """Prints events as they happen."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        """Print one event as one line."""
        self._stream.write(format_event(event) + "\n")
        self._stream.flush()
