"""A command that is told to end, ends: SIGTERM is Ctrl-C, and what does not let go in time is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE_S = 9.0
"""Less than the ten seconds after which containers are killed."""

ECHO_S = 0.5
"""Signals so close together are one: `timeout` and service managers tell a process and its group."""

INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
CAN_END_WITH_PARENT = _LIBC is not None


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone, `kill -9` included (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Ending:
    """The answer to SIGTERM and SIGINT: an interrupt first, the end at the second signal or after the patience."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._asked_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > ECHO_S:
                self._end("told twice to end")
            return
        self._asked_at = now
        timer = threading.Timer(self._patience_s, self._end, [f"did not end within {self._patience_s:.0f} s"])
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def _end(self, why: str) -> None:
        # Workers and servers end with this process; what is stored is whole.
        os.write(2, f"interrupted; {why}, ended at once; what was stored stays\n".encode())
        os._exit(INTERRUPTED)


_active: list[_Ending] = []


@contextlib.contextmanager
def ending_when_told(patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT raise KeyboardInterrupt, and the process is gone `patience_s` later at the most.

    A library that waits for a server that is gone cannot hold it up. Outside the main thread it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = _Ending(patience_s)
    before = {number: signal.signal(number, ending) for number in (signal.SIGTERM, signal.SIGINT)}
    _active.append(ending)
    try:
        yield
    finally:
        _active.remove(ending)
        for number, handler in before.items():
            signal.signal(number, handler)


def listen_again() -> None:
    """Answer SIGTERM as `ending_when_told` does, within something that put a handler of its own in its place."""
    if _active and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _active[-1])
