"""`esper serve`: one server for a store, its work pools and deployments, and workers; or a machine of workers alone."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from esper.karn.store import open_store
from esper.leyline.errors import SpecError
from esper.leyline.library import load
from esper.leyline.schedules import SERVED_NAME, ServedFlow, ServedSpec, ServiceSpec
from esper.leyline.secrets import mask
from flows.homes import HOME, ServerError, healthy, held, holder_of, make_home, say_who_holds
from flows.planning import GPU_POOL
from flows.server import LOOPBACK, PrefectServer, running_server, using_server
from flows.workers import WorkerPlan, Workers

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

DEFAULT_SERVICE = "default"
DEFAULT_PORT = 4200
WATCH_S = 2.0
PENDING_TIMEOUT_S = 600.0
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
AUTH_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"


@dataclass(frozen=True)
class ServeOptions:
    """What `esper serve` was asked for.

    Attributes:
        store: A path or an address.
        config: Name or TOML file of a service.
        host: Where the server listens.
        port: Its port; 0 takes a free one.
        workers: Worker processes of pool `cpu`, one slot each.
        devices: The GPU slots of this machine: one worker of pool `gpu` for each.
        expose: Whether another host than loopback is meant.
        credentials_block: The Prefect block whose variables the workers get.
    """

    store: str | None = None
    config: str = DEFAULT_SERVICE
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    workers: int = 1
    devices: tuple[str, ...] = ()
    expose: bool = False
    credentials_block: str | None = None

    def check(self) -> ServiceSpec:
        """Return the service; raise where something is wrong, before anything is started."""
        if self.host not in LOOPBACK_HOSTS and not self.expose:
            raise SpecError(
                f"--host {self.host} lets other machines start work here\n"
                f"  expected: --expose beside it, where that is meant; without, the server listens on {LOOPBACK} alone"
            )
        if self.workers < 0 or not 0 <= self.port < 65536:
            raise SpecError(f"--workers {self.workers} --port {self.port}\n  expected: 0 or more, and 0 to 65535")
        if any(not device.startswith("cuda") for device in self.devices):
            raise SpecError(
                f"--devices {' '.join(self.devices)}, and pool {GPU_POOL} counts GPUs\n"
                "  expected: cuda:0 or so; --workers says how many slots of pool cpu this machine fills"
            )
        return load_service(self.config)

    def plans(self) -> list[WorkerPlan]:
        """Return the workers of this machine."""
        cpu = [WorkerPlan(name=f"cpu-{number}", pool="cpu") for number in range(1, self.workers + 1)]
        gpu = [
            WorkerPlan(name=f"gpu-{number}", pool=GPU_POOL, devices=(device,))
            for number, device in enumerate(self.devices, 1)
        ]
        return [*cpu, *gpu]


@dataclass(frozen=True)
class WorkerOptions:
    """A machine of workers alone.

    Attributes:
        api: Address of the server's API.
        pool: Whose runs.
        limit: So many at once.
        devices: One worker for each, in place of `limit`.
        credentials_block: The Prefect block whose variables the workers get.
    """

    api: str
    pool: str
    limit: int = 1
    devices: tuple[str, ...] = ()
    credentials_block: str | None = None

    def check(self) -> None:
        """Raise SpecError where something is wrong, before anything is started."""
        if not re.fullmatch(SERVED_NAME, self.pool):
            raise SpecError(f"pool {self.pool!r}\n  expected: 1 to 40 of a-z, 0-9 and '-'")
        if self.limit < 1:
            raise SpecError(f"--limit {self.limit}\n  expected: 1 or more runs at once")
        if self.pool == GPU_POOL and not any(device.startswith("cuda") for device in self.devices):
            raise SpecError(f"--pool {GPU_POOL} without a GPU\n  expected: --devices cuda:0, one slot for each name")

    def plans(self) -> list[WorkerPlan]:
        """Return the workers; names tell this machine's from others."""
        own = f"{os.uname().nodename.lower()}-{os.getpid()}"
        if not self.devices:
            return [WorkerPlan(name=own, pool=self.pool, limit=self.limit)]
        return [
            WorkerPlan(name=f"{own}-{number}", pool=self.pool, devices=(device,))
            for number, device in enumerate(self.devices, 1)
        ]


def load_service(name: str) -> ServiceSpec:
    """Return a service whose parameters its flows take (SpecError, UnknownNameError)."""
    service = load("schedules", name, ServiceSpec)
    for served in service.deployments:
        check_parameters(served)
    return service


def check_parameters(served: ServedSpec) -> None:
    """Raise SpecError where a flow does not take the parameters; what they name may not exist yet."""
    from flows.datagen import DatagenRequest
    from flows.evaluation import EvaluateRequest
    from flows.grid import TrainRequest
    from flows.health import HealthRequest

    given = dict(served.parameters) | ({"dataset": "event"} if served.on else {})
    source = f"deployment {served.full_name}"
    if served.flow is ServedFlow.TRAIN_AND_EVALUATE:
        EvaluateRequest.parse(
            {"policies": [], "dataset": given.get("dataset"), "pipeline": given.pop("pipeline", "demo")}, source
        )
        TrainRequest.parse(given, source)
        return
    requests: dict[ServedFlow, Any] = {
        ServedFlow.DATAGEN: DatagenRequest,
        ServedFlow.HEALTH: HealthRequest,
        ServedFlow.TRAIN: TrainRequest,
        ServedFlow.EVALUATE: EvaluateRequest,
    }
    requests[served.flow].parse(given, source)


def next_times(served: ServedSpec, number: int = 1) -> list[datetime.datetime]:
    """Return when a schedule fires next, in its own timezone; nothing where it has none, or is not active.

    Raises:
        SpecError: The cron line or the timezone is wrong.
    """
    if not served.active or (served.cron is None and served.interval_s is None):
        return []
    import asyncio

    from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule
    from pydantic import ValidationError

    try:
        if served.cron is not None:
            cron = CronSchedule(cron=served.cron, timezone=served.timezone)
            return [*asyncio.run(cron.get_dates(number))]
        every = IntervalSchedule(interval=datetime.timedelta(seconds=served.interval_s or 0), timezone=served.timezone)
        return [*asyncio.run(every.get_dates(number))]
    except ValidationError as error:
        said = "; ".join(str(item["msg"]) for item in error.errors())
        raise SpecError(f"deployment {served.full_name}: {said}\n  expected: five fields, as in 0 2 * * *") from None


def describe(service: ServiceSpec) -> list[str]:
    """Return a line for each deployment: what starts it, when next, and its parameters."""
    lines = []
    for served in service.deployments:
        times = next_times(served)
        when = f"next {times[0]:%Y-%m-%d %H:%M:%S %Z}" if times else f"on {served.on}" if served.on else "by hand"
        rhythm = served.cron or (f"every {served.interval_s:g} s" if served.interval_s else "")
        if (served.cron or served.interval_s) and not served.active:
            when = "not active"
        parameters = " ".join(f"{key}={value}" for key, value in served.parameters.items())
        lines.append(f"{served.full_name:28} {served.pool:5} {rhythm:14} {when:30} {parameters}".rstrip())
    return lines


@contextlib.contextmanager
def serving(options: ServeOptions, tell: Callable[[str], None]) -> Iterator[Service]:
    """Run server, pools, deployments and workers; leaving it ends them all.

    Raises:
        SpecError: The service is wrong, or a host needs `--expose`.
        ServerError: Another process has the store's server, or the server did not start.
    """
    service = options.check()
    lines = describe(service)
    store = open_store(options.store)
    home = make_home(store.root / HOME)
    with held(home) as is_ours:
        if not is_ours:
            raise ServerError(_who_else(home))
        with running_server(home, options.host, options.port) as server:
            from flows.registering import register

            register(service, store.place.url, Path.cwd())
            extra = credentials(options.credentials_block)
            workers = Workers(options.plans(), home, server.url, extra, tell)
            workers.start()
            say_who_holds(home, "serve", server.url)
            try:
                yield Service(server, workers, tell, lines)
            finally:
                workers.stop()


def _who_else(home: Path) -> str:
    holder = holder_of(home)
    if holder is None:
        return f"another process has its Prefect server in {home}\n  wait until it ends, or serve another store"
    what = "esper serve" if holder.kind == "serve" else "a command with a server of its own"
    return (
        f"{what} has this store already: process {holder.pid}, {holder.url}\n"
        f"  its state: {home}\n  stop it first, or serve another store"
    )


def credentials(block: str | None) -> dict[str, str]:
    """Return the variables of a credentials block, none without one."""
    if block is None:
        return {}
    from flows.secrets import block_environment

    return block_environment(block)


@dataclass
class Service:
    """What runs: the server, the workers, and what to tell of the runs."""

    server: PrefectServer
    workers: Workers
    tell: Callable[[str], None]
    lines: Sequence[str] = ()
    _states: dict[UUID, str] = field(default_factory=dict)
    _look_at: float = 0.0
    _since: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    def watch(self) -> None:
        """Tend server and workers, and tell of runs that began or ended, until interrupted."""
        while True:
            self.tend()
            time.sleep(WATCH_S)

    def tend(self) -> None:
        """Look after everything once."""
        import httpx

        if not self.server.alive:
            self.tell("the server ended; it is started again")
            self.server.start()
            self.server.wait_until_ready()
        try:
            self.workers.tend()
            self._end_what_never_began()
            for run in self._recent_runs():
                self._tell_of(run)
        except httpx.HTTPError as error:
            self.tell(f"the server did not answer ({type(error).__name__}); asked again in {WATCH_S:.0f} s")

    def _end_what_never_began(self) -> None:
        """End runs that a worker took and that did not begin: the worker was lost with them, and they hold a slot."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
        from prefect.client.schemas.objects import State, StateType
        from prefect.states import Crashed

        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + PENDING_TIMEOUT_S / 4
        pending = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])))
        old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=PENDING_TIMEOUT_S)
        with get_client(sync_client=True) as client:
            for run in client.read_flow_runs(flow_run_filter=pending, limit=200):
                if run.state is not None and run.state.timestamp < old:
                    lost: State[Any] = Crashed(
                        message=f"a worker took it and did not begin within {PENDING_TIMEOUT_S:.0f} s"
                    )
                    client.set_flow_run_state(run.id, lost, force=True)

    def _recent_runs(self) -> list[FlowRun]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterDeploymentId,
            FlowRunFilterStartTime,
            FlowRunFilterState,
            FlowRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType

        seen = [run for run, state in self._states.items() if state == "running"]
        wanted = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(is_null_=False),
            start_time=FlowRunFilterStartTime(after_=self._since - datetime.timedelta(hours=1)),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(
                    any_=[
                        StateType.RUNNING,
                        StateType.COMPLETED,
                        StateType.FAILED,
                        StateType.CRASHED,
                        StateType.CANCELLED,
                    ]
                )
            ),
        )
        with get_client(sync_client=True) as client:
            recent = client.read_flow_runs(flow_run_filter=wanted, limit=200)
            known = {run.id for run in recent}
            return [*recent, *(client.read_flow_run(run) for run in seen if run not in known)]

    def _tell_of(self, run: FlowRun) -> None:
        state = run.state
        if state is None or (run.end_time is not None and run.end_time < self._since):
            return
        now = "running" if state.is_running() else str(state.name)
        if self._states.get(run.id) == now or (run.id not in self._states and state.is_final() and not run.start_time):
            return
        self._states[run.id] = now
        if now == "running":
            self.tell(f"began  {run.name}")
        elif state.is_final():
            message = f": {mask(state.message)}" if state.message and not state.is_completed() else ""
            self.tell(f"ended  {run.name}  {now} after {run.total_run_time.total_seconds():.0f} s{message}")


@contextlib.contextmanager
def working(options: WorkerOptions, tell: Callable[[str], None]) -> Iterator[Workers]:
    """Run workers of a server elsewhere; leaving it ends them and what they run.

    Raises:
        SpecError: The pool's name is wrong, or the server has no such pool.
        ServerError: The server does not answer.
    """
    options.check()
    if not healthy(options.api):
        raise ServerError(
            f"no Prefect server answers at {mask(options.api)}\n"
            "  expected: http://HOST:PORT/api of an `esper serve --host HOST --expose` that runs"
        )
    with tempfile.TemporaryDirectory(prefix="esper-worker-") as folder, using_server(options.api, Path(folder)):
        _require_pool(options.pool)
        workers = Workers(options.plans(), Path(folder), options.api, credentials(options.credentials_block), tell)
        workers.start()
        try:
            yield workers
        finally:
            workers.stop()


def _require_pool(pool: str) -> None:
    from prefect.client.orchestration import get_client

    from esper.leyline.errors import unknown_name

    with get_client(sync_client=True) as client:
        known = [item.name for item in client.read_work_pools()]
    if pool not in known:
        raise unknown_name("work pool", pool, known)
