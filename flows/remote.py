"""Data generation on the workers of a Prefect pool: blocks of cohorts, committed straight to the shared store.

The coordinator (`esper datagen --pool`) writes each block's plans into the store, submits a run of the deployment
`cohorts/POOL` for it, and reads what came of it. A block whose run crashed or was lost is handed out again: what it
stored is not run twice, and each of its other cohorts then goes alone: one that kills its worker costs no other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from pydantic import Field

from esper.karn.places import MissingFileError, Place
from esper.karn.store import Dataset, open_store
from esper.leyline.errors import EsperError, IntegrityError, SpecError, StoreError
from esper.leyline.matrix import CohortPlan
from esper.leyline.secrets import mask
from esper.leyline.spec_base import Spec
from flows.context import Context, cohort_name
from flows.failures import MAX_TRIES, Tries
from flows.orchestration import LocalOrchestrator, Unit
from flows.planning import remaining

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.datagen import CohortDone

FOLDER = "blocks"
BLOCK_S = 60.0
"""A block lasts about so long: starting its run costs seconds."""

MAX_COHORTS = 64
TRIES = 3
POLL_S = 1.0
BLOCKS_PER_SLOT = 2
PENDING_TIMEOUT_S = 600.0
"""A run that a worker took and has not begun for so long was lost with the worker."""

IDLE_NOTE_S = 30.0
DEFAULT_SLOTS = 4


class RemoteError(EsperError):
    """A cohort was lost with its worker, or failed there."""


class Block(Spec):
    """Cohorts that a worker runs one after another."""

    run: str
    plans: tuple[CohortPlan, ...]


class Outcome(Spec):
    """What came of one cohort of a block: what was done, or the error."""

    done: dict[str, int] | None = None
    error: str | None = None
    trace: str = ""
    wall_s: float = 0.0


class Answer(Spec):
    """What came of a block's cohorts so far, by their place in it."""

    outcomes: dict[int, Outcome] = Field(default_factory=dict)


# ---- on a worker


def run_block(store: str, dataset: str, block: str, devices: Sequence[str] | None) -> tuple[int, int]:
    """Run a block and write its answer as it goes; return how many cohorts were done and how many failed.

    Raises:
        StoreError: The block is gone, or the store cannot be written.
    """
    from flows.datagen import run_cohort

    opened = open_store(store)
    held = opened.dataset(dataset)
    blocks = held.place.child(FOLDER)
    job = Block.model_validate_json(blocks.read_text(f"{block}.json"))
    known = held.episode_ids(failed=False)
    answer = Answer()
    with _worker_context(store, held, job.run, devices) as context:
        for index, plan in enumerate(job.plans):
            started = time.monotonic()
            units = [
                Unit("cohort", cohort_name(rest), partial(run_cohort, context, rest), MAX_TRIES - 1, Tries())
                for rest in remaining([plan], known)
            ]
            outcome = Outcome(done={})
            for _, done in context.orchestrator.units(units):
                outcome = _outcome(done, time.monotonic() - started)
            answer = Answer(outcomes={**answer.outcomes, index: outcome})
            blocks.write_over(f"{block}.answer.json", answer.model_dump_json())
    return len(answer.outcomes), sum(outcome.error is not None for outcome in answer.outcomes.values())


def _outcome(done: CohortDone | Exception, wall_s: float) -> Outcome:
    if isinstance(done, StoreError | IntegrityError):
        raise done
    if isinstance(done, Exception):
        trace = "".join(getattr(done, "__notes__", []))
        return Outcome(error=mask(str(done)) or type(done).__name__, trace=mask(trace))
    return Outcome(done=asdict(done), wall_s=wall_s)


@contextlib.contextmanager
def _worker_context(store: str, dataset: Dataset, run: str, devices: Sequence[str] | None) -> Iterator[Context]:
    """A context of the coordinator's run on this machine: one process, events in a file of its own."""
    from esper.nissa.writer import Emitter, FileSink
    from esper.tolaria.workers import CohortPool
    from flows.progress import reporter

    folder = dataset.path / "runs" / run
    sink = FileSink(folder / f"events-{socket.gethostname()}-{os.getpid()}.jsonl")
    with CohortPool(len(devices or ()), devices=devices) as pool, reporter() as progress:
        try:
            emitter = Emitter(run, (sink,))
            yield Context(open_store(store), dataset, run, folder, pool, LocalOrchestrator(1), progress, emitter)  # type: ignore[arg-type]
        finally:
            sink.close()


# ---- the coordinator


@dataclass
class _Sent:
    """A block that was handed out."""

    name: str
    indices: list[int]
    run: UUID
    pending_since: float | None = None


@dataclass
class _Pace:
    """Seconds that cohorts of an environment took."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def note(self, environment: str, wall_s: float) -> None:
        self.seconds.setdefault(environment, []).append(wall_s)

    def cohorts(self, environment: str) -> int:
        """How many make a block; one where nothing is known yet."""
        known = [value for value in self.seconds.get(environment, []) if value > 0]
        if not known:
            return 1
        return max(1, min(MAX_COHORTS, math.ceil(BLOCK_S * len(known) / sum(known))))


class Pooled(Protocol):
    """A request for workers elsewhere.

    Attributes:
        pool: Name of the work pool, of whose deployment `cohorts/POOL` the blocks are runs.
        batch_size: Cohorts of a block; None for as many as take about half a minute.
    """

    @property
    def pool(self) -> str | None: ...  # noqa: D102

    @property
    def batch_size(self) -> int | None: ...  # noqa: D102


def run_blocks(
    context: Context, request: Pooled, parts: Sequence[CohortPlan]
) -> Iterator[tuple[int, CohortDone | Exception]]:
    """Run cohorts on the workers of a pool; yield (index, what was done or the error) as they end.

    Args:
        context: The coordinator's run, under Prefect.
        request: Where, and in how large blocks.
        parts: The cohorts.

    Raises:
        SpecError: The run is without Prefect, or the server has no such deployment.
        StoreError: The store cannot be written.
    """
    if request.pool is None:
        raise SpecError("no pool is named\n  expected: --pool NAME")
    if isinstance(context.orchestrator, LocalOrchestrator):
        raise SpecError(f"--pool {request.pool} needs Prefect\n  leave --no-prefect out, and start `esper serve` first")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        coordinator = _Coordinator(context, client, request.pool, parts, request.batch_size)
        try:
            yield from coordinator.run()
        finally:
            coordinator.recall()


class _Coordinator:
    def __init__(
        self,
        context: Context,
        client: SyncPrefectClient,
        pool: str,
        parts: Sequence[CohortPlan],
        batch_size: int | None,
    ) -> None:
        self._context = context
        self._client = client
        self._pool = pool
        self._parts = parts
        self._batch_size = batch_size
        self._deployment, self._slots = _deployment_of(client, pool)
        self._most = BLOCKS_PER_SLOT * self._slots
        self._blocks: Place = context.dataset.place.child(FOLDER)
        self._waiting: deque[list[int]] = deque()
        self._fresh: deque[int] = deque(sorted(range(len(parts)), key=lambda i: parts[i].environment.name))
        self._sent: dict[UUID, _Sent] = {}
        self._tries = dict.fromkeys(range(len(parts)), 0)
        self._pace = _Pace()
        self._number = 0
        self._moved = time.monotonic()

    def run(self) -> Iterator[tuple[int, CohortDone | Exception]]:
        """Hand out, watch, collect, until everything has an outcome."""
        while self._sent or self._waiting or self._fresh:
            while len(self._sent) < self._most and (indices := self._next()):
                self._send(indices)
            time.sleep(POLL_S)
            for run in self._runs():
                yield from self._look_at(run)
            self._note_if_idle()

    def _next(self) -> list[int]:
        """The cohorts of the next block, all of one environment; those handed out again go first and alone."""
        if self._waiting:
            return self._waiting.popleft()
        if not self._fresh:
            return []
        environment = self._parts[self._fresh[0]].environment.name
        most = self._batch_size or self._pace.cohorts(environment)
        most = max(1, min(most, math.ceil(len(self._fresh) / self._slots)))  # no slot is left without work
        taken: list[int] = []
        while self._fresh and len(taken) < most and self._parts[self._fresh[0]].environment.name == environment:
            taken.append(self._fresh.popleft())
        return taken

    def _send(self, indices: list[int]) -> None:
        self._number += 1
        name = f"{self._context.run}-{self._number:05d}"
        plans = tuple(self._parts[index] for index in indices)
        self._blocks.write_over(f"{name}.json", Block(run=self._context.run, plans=plans).model_dump_json())
        names = [cohort_name(plan) for plan in plans]
        run = self._client.create_flow_run_from_deployment(
            self._deployment,
            parameters={
                "store": self._context.store.place.url,
                "dataset": self._context.dataset.name,
                "block": name,
                "names": names,
            },
            name=f"{names[0]}+{len(names) - 1}" if len(names) > 1 else names[0],
            tags=["esper", "cohorts", self._context.dataset.name, self._context.run],
            idempotency_key=name,
        )
        self._sent[run.id] = _Sent(name, indices, run.id)
        for index in indices:
            self._tries[index] += 1

    def _runs(self) -> list[FlowRun]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        if not self._sent:
            return []
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(self._sent)))
        return self._client.read_flow_runs(flow_run_filter=wanted, limit=len(self._sent))

    def _look_at(self, run: FlowRun) -> Iterator[tuple[int, CohortDone | Exception]]:
        from prefect.client.schemas.objects import State
        from prefect.states import Crashed

        sent, state = self._sent[run.id], run.state
        if state is None:
            return
        if state.is_final():
            del self._sent[run.id]
            self._moved = time.monotonic()
            yield from self._collect(sent, f"{state.name}: {state.message}")
            return
        if state.is_running():
            self._moved = time.monotonic()
        if not state.is_pending():
            sent.pending_since = None
            return
        sent.pending_since = sent.pending_since or time.monotonic()
        if time.monotonic() - sent.pending_since > PENDING_TIMEOUT_S:
            lost: State[Any] = Crashed(message=f"a worker took it and did not begin within {PENDING_TIMEOUT_S:.0f} s")
            self._client.set_flow_run_state(run.id, lost, force=True)

    def _collect(self, sent: _Sent, why: str) -> Iterator[tuple[int, CohortDone | Exception]]:
        """Yield what a block's run left; what has no outcome is handed out again, or given up."""
        from flows.datagen import CohortDone

        answer = self._answer(sent)
        for place, index in enumerate(sent.indices):
            outcome = answer.outcomes.get(place)
            plan = self._parts[index]
            if outcome is None:
                if self._tries[index] < TRIES:
                    self._waiting.append([index])
                else:
                    yield index, RemoteError(f"{cohort_name(plan)}: lost {TRIES} times with its run\n  last: {why}")
            elif outcome.error is not None:
                error = RemoteError(outcome.error)
                error.add_note(outcome.trace)
                yield index, error
            else:
                self._pace.note(plan.environment.name, outcome.wall_s)
                yield index, CohortDone(**outcome.done) if outcome.done else CohortDone(plan.num_planned, 0, 0)
        self._forget(sent)

    def _answer(self, sent: _Sent) -> Answer:
        try:
            return Answer.model_validate(json.loads(self._blocks.read_text(f"{sent.name}.answer.json")))
        except MissingFileError:
            return Answer()

    def _forget(self, sent: _Sent) -> None:
        for ending in ("json", "answer.json"):
            self._blocks.remove(f"{sent.name}.{ending}")

    def _note_if_idle(self) -> None:
        idle_s = time.monotonic() - self._moved
        if idle_s > IDLE_NOTE_S:
            self._context.progress.note("cohorts", f"nothing runs for {idle_s:.0f} s: has pool {self._pool} workers?")

    def recall(self) -> None:
        """Call off what was handed out and has not ended: after Ctrl-C, or an error."""
        import httpx
        from prefect.states import Cancelled, Cancelling

        for sent in self._sent.values():
            with contextlib.suppress(httpx.HTTPError, StoreError):
                state = self._client.read_flow_run(sent.run).state
                begun = state is not None and (state.is_running() or state.is_pending())
                called_off: Any = Cancelling() if begun else Cancelled(message="its coordinator ended")
                self._client.set_flow_run_state(sent.run, called_off, force=True)
                self._forget(sent)
        self._sent.clear()


def _deployment_of(client: SyncPrefectClient, pool: str) -> tuple[UUID, int]:
    """The deployment of a pool's blocks, and the pool's slots."""
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_deployment_by_name(f"cohorts/{pool}")
        slots = client.read_work_pool(pool).concurrency_limit
    except ObjectNotFound:
        raise SpecError(
            f"the Prefect server at {client.api_url} serves no deployment cohorts/{pool}\n"
            "  start one on this store: esper serve; from another machine: PREFECT_API_URL=http://HOST:PORT/api"
        ) from None
    return found.id, slots or DEFAULT_SLOTS
