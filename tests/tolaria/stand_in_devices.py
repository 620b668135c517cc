"""Jobs for workers that say where they run. Importable by spawned workers."""

from __future__ import annotations

import os
import signal
import time


def slot_and_process(wait_s: float) -> tuple[str, int]:
    """The worker's slot and its process, after a wait that gives others their turn."""
    from esper.tolaria.runtime import slot_device

    time.sleep(wait_s)
    return str(slot_device()), os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
