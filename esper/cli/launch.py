"""How commands start flows: under Prefect or in process, with one way to end on Ctrl-C."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypeVar

from esper.leyline.secrets import mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.context import RunOptions
    from flows.orchestration import Orchestrator

    Request = TypeVar("Request", bound=RunOptions)
    T = TypeVar("T")

INTERRUPTED = 130


def default_workers() -> int:
    """One worker per core that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def workers_for(workers: int | None, devices: list[str] | None) -> int | None:
    """The number of worker processes asked for; where devices are, None leaves it to them."""
    return default_workers() if workers is None and devices is None else workers


def launch(command: str, request: Request, core: Callable[[Request, Orchestrator], T], *, prefect: bool) -> T:
    """Run a flow function and return its result.

    On Ctrl-C or SIGTERM prints what is stored and exits with 130; workers and server are gone by then.
    """
    from flows.ending import ending_when_told

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded here: learners and digests want one thread
    request.check_devices()
    request.check()  # a mistyped name must not cost the start of a server
    try:
        with ending_when_told():
            if prefect:
                from flows.server import run_with_prefect

                return run_with_prefect(command, request, core)
            from flows.orchestration import LocalOrchestrator

            return core(request, LocalOrchestrator(request.workers))
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", None) or [
            "interrupted; what was stored stays, the same command goes on"
        ]
        print(mask("\n".join(notes)), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
