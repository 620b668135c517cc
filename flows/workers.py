"""Prefect worker processes of this machine: started again when they die, and what they were running reported.

A worker fills slots of a work pool. A flow run notes its process in a folder, so that the run of a process that was
killed is told to the server within seconds; the server alone would wait for a heartbeat for minutes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from uuid import UUID

from esper.leyline.spec_base import Spec
from esper.tolaria.workers import ONE_THREAD
from flows.ending import end_with_parent
from flows.server import API_URL, settings, start_child, stop_group

DEVICES_VARIABLE = "ESPER_WORKER_DEVICES"
"""What the flow runs of a worker compute on, unless they say otherwise: `cuda:0`."""

RUNS_VARIABLE = "ESPER_WORKER_RUNS"
RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
QUERY_EVERY_S = 2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STEADY_S = 60.0
"""A worker that lived so long is started again without a pause."""


class WorkerPlan(Spec):
    """One worker process: so many runs of a pool at once, on these devices."""

    name: str
    pool: str
    limit: int = 1
    devices: tuple[str, ...] = ()


@contextlib.contextmanager
def running_here() -> Iterator[None]:
    """Within it, the flow run of this process is noted; without a worker of Esper's above it changes nothing."""
    folder, run = os.environ.get(RUNS_VARIABLE), os.environ.get(RUN_VARIABLE)
    if not folder or not run:
        yield
        return
    end_with_parent()
    note = Path(folder) / run
    note.write_text(str(os.getpid()), encoding="utf-8")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


@dataclass
class _Place:
    plan: WorkerPlan
    process: Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    again_at: float = 0.0


@dataclass
class Workers:
    """The workers of this machine. Start and tend them from the main thread, to which their lives are tied.

    Args:
        plans: Which.
        home: Folder of their logs and notes.
        api: Address of the server's API.
        extra: Further environment variables, as credentials; never written anywhere.
        tell: What prints a line.
    """

    plans: Sequence[WorkerPlan]
    home: Path
    api: str
    extra: dict[str, str]
    tell: Callable[[str], None]
    _places: list[_Place] = field(default_factory=list)

    def start(self) -> None:
        """Start them all."""
        self._runs.mkdir(parents=True, exist_ok=True)
        self._places = [_Place(plan) for plan in self.plans]
        for place in self._places:
            self._start(place)

    @property
    def _runs(self) -> Path:
        return self.home / "running"

    def _start(self, place: _Place) -> None:
        plan = place.plan
        command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
        command += ["--pool", plan.pool, "--name", plan.name, "--limit", str(plan.limit)]
        with (self.home / f"worker-{plan.name}.log").open("ab") as log:
            place.process = start_child(command, self._environment(plan), log)
        place.started = time.monotonic()

    def _environment(self, plan: WorkerPlan) -> dict[str, str]:
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **self.extra,
            **settings(self.home),
            **ONE_THREAD,
            API_URL: self.api,
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",  # `python` is this installation's
            "PREFECT_WORKER_QUERY_SECONDS": str(QUERY_EVERY_S),
            RUNS_VARIABLE: str(self._runs),
            DEVICES_VARIABLE: " ".join(plan.devices),
        }

    def tend(self) -> None:
        """Start again what died, and report the runs of processes that are gone."""
        now = time.monotonic()
        for place in self._places:
            if place.process is not None and (code := place.process.poll()) is not None:
                stop_group(place.process, patience_s=0)  # what it was running
                place.process = None
                place.pause_s = FIRST_PAUSE_S if now - place.started > STEADY_S else 2 * place.pause_s
                place.again_at = now + min(place.pause_s, LONGEST_PAUSE_S)
                self.tell(f"worker {place.plan.name} ended with code {code}; it is started again")
            if place.process is None and now >= place.again_at:
                self._start(place)
        self.report_lost()

    def report_lost(self) -> None:
        """Tell the server which runs of this machine ended without a word."""
        for note in self._runs.glob("*"):
            try:
                pid = int(note.read_text(encoding="utf-8") or "0")
            except (OSError, ValueError):
                continue
            if pid and not _lives(pid):
                _crash(note.name, "its process was killed")
                note.unlink(missing_ok=True)

    def stop(self) -> None:
        """End them with what they run, and say so of each run."""
        running = [place.process for place in self._places if place.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # all at once, then each in turn
        for process in running:
            stop_group(process)
        self._places = []
        self.report_lost()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _crash(run: str, why: str) -> None:
    """Set a run's state to CRASHED unless it has ended; a server that cannot be reached learns it from silence."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    with contextlib.suppress(ObjectNotFound, httpx.HTTPError, ValueError), get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(run)).state
        if state is None or not state.is_final():
            client.set_flow_run_state(UUID(run), Crashed(message=why), force=True)
