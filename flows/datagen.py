"""Data generation: matrix, cohorts, commits, a sealed version. What the store holds already is never run again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Self

import pyarrow as pa
from pydantic import Field, JsonValue, model_validator

from esper.karn.kinds import SUFFIX, refuse_mixture
from esper.karn.progress_table import record_plan, stored_outcomes, without_ids
from esper.karn.store import Dataset, open_store
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, StoreError
from esper.leyline.events import EventKind
from esper.leyline.matrix import CohortPlan, MatrixSpec
from esper.leyline.schedules import StoreEvent
from esper.leyline.specs import Numerics
from flows.automations import announce, announce_verdict
from flows.context import Context, RunOptions, cohort_name, open_context
from flows.failures import MAX_TRIES, Tries, failed_tables
from flows.health import check_health
from flows.orchestration import Orchestrator, Unit
from flows.planning import (
    Selection,
    computed_epochs,
    epochs_per_episode,
    one_by_one,
    plan_matrix,
    remaining,
    slices,
    slot_of_pool,
    under_numerics,
)
from flows.provenance import provenance
from flows.tally import Shown, Tally


class DatagenRequest(RunOptions):
    """Generate the episodes of a matrix into a dataset.

    Attributes:
        matrix: Name of a matrix, or a TOML file.
        dataset: Left out, named after the matrix (`skeleton` adds its own ending).
        selection: A part of the matrix, or another number of its episodes.
        numerics: Of every environment, in place of its own; left out, what the devices need.
        max_lineages: Most lineages that a worker trains at once; a cohort that could have more runs in parts.
        retry_failed: Run episodes again that are stored as failed, once each.
        health: Check the version afterwards.
        skeleton: Make the episodes up instead of training hosts.
        pool: A Prefect work pool whose workers run the cohorts, on whatever machine they are.
        batch_size: Cohorts that are handed to the pool as one piece of work.
    """

    matrix: str
    dataset: str | None = None
    selection: Selection | None = None
    numerics: Numerics | None = None
    max_lineages: Annotated[int, Field(ge=2)] | None = None
    retry_failed: bool = False
    health: bool = False
    skeleton: bool = False
    pool: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.batch_size is not None and self.pool is None:
            raise ValueError("batch_size is of a work pool; name it with --pool, or leave --batch-size out")
        if self.skeleton and any(given is not None for given in (self.pool, self.devices, self.max_lineages)):
            raise ValueError("a skeleton trains nothing: leave --pool, --devices and --max-lineages out")
        if self.pool is not None and self.devices is not None:
            raise ValueError("the workers of a pool have devices of their own: leave --devices out, or --pool")
        return self

    def check(self) -> None:
        """Raise where the matrix, the selection, the numerics or the dataset is wrong."""
        matrix, _ = self.plan()
        refuse_mixture(self.open_dataset(matrix), skeleton=self.skeleton)

    def open_dataset(self, matrix: MatrixSpec) -> Dataset:
        """Return where the episodes belong (SpecError where the name is not allowed)."""
        default = f"{matrix.name}{SUFFIX}" if self.skeleton else matrix.name
        return open_store(self.store).dataset(self.dataset or default)

    def plan(self) -> tuple[MatrixSpec, list[CohortPlan]]:
        """Return the matrix and its cohorts, under the numerics in which they will run."""
        matrix, plans = plan_matrix(self.matrix, self.selection)
        slots = self.devices if self.pool is None else [slot_of_pool(self.pool, plans, self.numerics)]
        return matrix, under_numerics(plans, slots, self.numerics)


@dataclass(frozen=True)
class CohortDone:
    """One cohort's part in the measured cost."""

    episodes: int
    alone_epochs: int
    computed_epochs: int


@dataclass(frozen=True)
class Generated:
    """What a data generation did.

    Attributes:
        version: The sealed version that holds every planned episode.
        sealed: Whether it was sealed by this run.
        new_episodes: Episodes that this run computed and stored, failed ones not counted.
        failed_episodes: Episodes that were stored as failed.
        alone_epochs: Host epochs of the new episodes if each had run alone.
        computed_epochs: Host epochs that were computed.
        progress: Planned, done and failed episodes of every cell (see `esper.karn.progress_table`).
    """

    version: Version
    sealed: bool
    new_episodes: int
    failed_episodes: int
    alone_epochs: int
    computed_epochs: int
    progress: pa.Table

    @property
    def ratio(self) -> float | None:
        """Host epochs alone over computed, None where nothing was computed."""
        return self.alone_epochs / self.computed_epochs if self.computed_epochs else None

    @property
    def can_be_checked(self) -> bool:
        """Whether there is an episode that has not failed: health has nothing to look at without one."""
        counts = self.version.manifest.counts
        return counts["failed"] < counts["episodes"]


def run_datagen(request: DatagenRequest, orchestrator: Orchestrator) -> Generated:
    """Carry out a request; what is stored already is left out.

    Raises:
        SpecError: The matrix, the selection, a device or the numerics are wrong.
        StoreError: The store cannot be written.
    """
    matrix, plans = request.plan()
    dataset = request.open_dataset(matrix).name
    with open_context(request, dataset, "datagen", orchestrator, events={"matrix": matrix.name}) as context:
        if request.skeleton:
            generated = _generate_skeleton(context, matrix, plans, request)
        else:
            generated = generate(
                context,
                matrix,
                plans,
                retry_failed=request.retry_failed,
                max_lineages=request.max_lineages,
                request=request,
            )
        if request.health and generated.can_be_checked and generated.version.verdict() is None:
            checked = orchestrator.stage("health", partial(check_health, context, generated.version))
            announce_verdict(checked.version, checked.verdict, context.store, orchestrator)
        elif generated.sealed and generated.can_be_checked and not request.skeleton:
            announce(StoreEvent.SEALED, generated.version, context.store, orchestrator)
        return generated


def _generate_skeleton(
    context: Context, matrix: MatrixSpec, plans: Sequence[CohortPlan], request: DatagenRequest
) -> Generated:
    from esper.tolaria.workers import CohortPool
    from flows.skeleton import skeleton_cohort

    with CohortPool(request.workers, engine=skeleton_cohort) as pool:
        return generate(
            replace(context, pool=pool),
            matrix,
            plans,
            retry_failed=request.retry_failed,
            skeleton=True,
            request=request,
        )


def generate(
    context: Context,
    matrix: MatrixSpec,
    plans: Sequence[CohortPlan],
    *,
    retry_failed: bool = False,
    max_lineages: int | None = None,
    skeleton: bool = False,
    request: DatagenRequest | None = None,
) -> Generated:
    """Run the cohorts that are not stored yet, commit each as it ends, and seal a version that holds them all.

    Where `max_lineages` is given, a large cohort runs as several smaller ones; the version's digest stays the same.
    A cohort that fails is tried again, not where the same error came before; one with branches then runs again in
    parts, so that a branch that cannot be carried out costs the others nothing. What still fails is stored as failed,
    with the error, and the rest goes on; `retry_failed` tries it once more.

    Args:
        context: The run; its pool's engine runs the cohorts.
        matrix: What is planned.
        plans: The cohorts.
        retry_failed: Run what is stored as failed too.
        max_lineages: Most lineages of a part of a cohort.
        skeleton: Whether the pool's engine makes episodes up.
        request: What asked for it; where it names a work pool, that pool's workers run the cohorts and store them.

    Raises:
        SpecError: The dataset holds episodes of the other kind, real or made up.
        StoreError: The store cannot be written.
    """
    refuse_mixture(context.dataset, skeleton=skeleton)
    tally = Tally(record_plan(context.dataset, matrix, plans, skeleton=skeleton), stored_outcomes(context.dataset))
    failed_before = tally.failed_ids()
    rest = remaining(plans, tally.known_ids(failed=not retry_failed))
    # Replicate by replicate: what an interruption leaves behind covers every environment.
    todo = sorted(rest, key=lambda plan: plan.replicate)
    if retry_failed:
        tally.forget(failed_before)
    work = _Work(context, request, tally, failed_before)
    with _explain_interrupt(context, work):
        work.carry_out([part for plan in todo for part in slices(plan, max_lineages)])
    measured = _measured(work.done, todo)
    before = context.dataset.version_numbers()
    version = None if todo else latest_with(context.dataset, plans)
    if version is None:
        origin = _with_earlier(context.dataset, provenance(matrix, plans, measured))
        origin = {**origin, "planned": without_ids(tally.plan), **({"skeleton": True} if skeleton else {})}
        version = context.dataset.seal(matrix_id=matrix.spec_id, provenance=origin)
    return Generated(
        version=version,
        sealed=version.number not in before,
        new_episodes=sum(item.episodes for item in work.done),
        failed_episodes=work.num_failed,
        alone_epochs=sum(item.alone_epochs for item in work.done),
        computed_epochs=sum(item.computed_epochs for item in work.done),
        progress=tally.table(),
    )


def _measured(done: Sequence[CohortDone], todo: Sequence[CohortPlan]) -> dict[str, JsonValue]:
    alone = sum(item.alone_epochs for item in done)
    computed = sum(item.computed_epochs for item in done)
    return {
        "alone": alone,
        "computed": computed,
        "least": sum(epochs_per_episode(plan) for plan in todo),
        "ratio": alone / computed if computed else None,
    }


def _with_earlier(dataset: Dataset, origin: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Keep the environments, rewards and numerics of the version before: its episodes are in the new one too."""
    versions = dataset.versions()
    earlier = versions[-1].manifest.provenance if versions else {}
    for key in ("environments", "rewards"):
        before, now = earlier.get(key), origin[key]
        if isinstance(before, dict) and isinstance(now, dict):
            origin = {**origin, key: {**before, **now}}
    numerics: set[JsonValue] = set()
    for said in (earlier.get("numerics"), origin["numerics"]):
        numerics |= {*said} if isinstance(said, list) else set()
    return {**origin, "numerics": [*sorted(numerics, key=str)]}


def latest_with(dataset: Dataset, plans: Sequence[CohortPlan]) -> Version | None:
    """Return the newest version if it holds every planned episode."""
    versions = dataset.versions()
    if not versions:
        return None
    held = set(versions[-1].table("episodes", columns=["episode_id"])["episode_id"].to_pylist())
    planned = {name for plan in plans for name in plan.planned_ids()}
    return versions[-1] if planned <= held else None


@dataclass
class _Work:
    """The cohorts of one run as they are carried out."""

    context: Context
    request: DatagenRequest | None
    tally: Tally
    failed_before: frozenset[str]
    done: list[CohortDone] = field(default_factory=list)
    num_failed: int = 0
    num_parts: int = 0

    def carry_out(self, parts: Sequence[CohortPlan]) -> None:
        """Run the parts, those with branches that fail again in smaller ones; store what fails in the end as failed.

        Raises:
            StoreError: The store cannot be written.
            IntegrityError: It is damaged.
        """
        self.num_parts = len(parts)
        with Shown(self.context, self.tally) as shown:
            while parts:
                again: list[CohortPlan] = []
                for index, outcome in self._run(parts):
                    part = parts[index]
                    if isinstance(outcome, StoreError | IntegrityError):
                        raise outcome
                    if not isinstance(outcome, Exception):
                        self.done.append(outcome)
                        self.tally.ended(part)
                    elif part.branches and part.num_planned > 1:
                        again += one_by_one(part)
                    else:
                        self.num_failed += _record_failure(self.context, part, outcome)
                        self.tally.ended(part, failed=True)
                    shown.update()
                parts = again

    def _run(self, parts: Sequence[CohortPlan]) -> Iterator[tuple[int, CohortDone | Exception]]:
        progress = self.context.progress
        progress.begin("cohorts", len(parts))
        for index, outcome in self._outcomes(parts):
            failed = isinstance(outcome, Exception)
            progress.advance("cohorts", f"{cohort_name(parts[index])}{' failed' if failed else ''}")
            yield index, outcome

    def _outcomes(self, parts: Sequence[CohortPlan]) -> Iterator[tuple[int, CohortDone | Exception]]:
        if self.request is not None and self.request.pool is not None:
            from flows.remote import run_blocks

            return run_blocks(self.context, self.request, parts)
        return self.context.orchestrator.units([self._unit(part) for part in parts])

    def _unit(self, part: CohortPlan) -> Unit[CohortDone]:
        """A part as a unit of work; what is stored as failed is tried once."""
        tries = Tries(1 if self.failed_before.issuperset(part.planned_ids()) else MAX_TRIES)
        run = partial(run_cohort, self.context, part)
        return Unit("cohort", cohort_name(part), run, retries=tries.at_most - 1, again=tries)


def run_cohort(context: Context, plan: CohortPlan) -> CohortDone:
    """Run one cohort on a worker and commit it from here: one process writes the tables."""
    context.events.emit(
        EventKind.COHORT_STARTED,
        {"environment": plan.environment.name, "replicate": plan.replicate, "episodes": plan.num_planned},
    )
    started = time.monotonic()
    tables = context.pool.submit(plan).result()
    context.commit(tables)
    done = CohortDone(
        episodes=plan.num_planned,
        alone_epochs=plan.num_planned * epochs_per_episode(plan),
        computed_epochs=computed_epochs(plan, tables["steps"]),
    )
    context.events.emit(
        EventKind.COHORT_ENDED,
        {
            "environment": plan.environment.name,
            "replicate": plan.replicate,
            "episodes": done.episodes,
            "host_epochs_alone": done.alone_epochs,
            "host_epochs_computed": done.computed_epochs,
            "wall_s": time.monotonic() - started,
        },
    )
    return done


def _record_failure(context: Context, plan: CohortPlan, error: Exception) -> int:
    context.commit(failed_tables(plan, error))
    context.events.emit(
        EventKind.COHORT_FAILED,
        {
            "environment": plan.environment.name,
            "replicate": plan.replicate,
            "error": str(error),
            "trace": "".join(getattr(error, "__notes__", [])),
        },
    )
    return plan.num_planned


@contextlib.contextmanager
def _explain_interrupt(context: Context, work: _Work) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            f"interrupted: {len(work.done)} of {work.num_parts} cohorts are stored in {context.dataset.place.show()}; "
            "the same command goes on with the rest"
        )
        raise
