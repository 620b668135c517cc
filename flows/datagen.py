"""Data generation: matrix, cohorts, commits, a sealed version. What the store holds already is never run again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, JsonValue

from esper.karn.store import Dataset, open_store
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, StoreError
from esper.leyline.events import EventKind
from esper.leyline.matrix import CohortPlan, MatrixSpec
from esper.leyline.specs import Numerics
from flows.context import Context, RunOptions, cohort_name, open_context
from flows.failures import failed_tables
from flows.health import check_health
from flows.orchestration import Orchestrator, Unit
from flows.planning import (
    Estimate,
    Selection,
    computed_epochs,
    epochs_per_episode,
    estimate,
    one_by_one,
    plan_matrix,
    remaining,
    slices,
    under_numerics,
)
from flows.provenance import provenance

if TYPE_CHECKING:
    from esper.tolaria.memory import MemoryBound


class DatagenRequest(RunOptions):
    """Generate the episodes of a matrix into a dataset.

    Attributes:
        matrix: Name of a matrix, or a TOML file.
        dataset: Left out, named after the matrix.
        selection: A part of the matrix.
        numerics: Of every environment, in place of its own; left out, what the devices need.
        max_lineages: Most lineages that a worker trains at once; a cohort that could have more runs in parts.
        retry_failed: Run episodes again that are stored as failed.
        health: Check the version afterwards.
    """

    matrix: str
    dataset: str | None = None
    selection: Selection | None = None
    numerics: Numerics | None = None
    max_lineages: Annotated[int, Field(ge=2)] | None = None
    retry_failed: bool = False
    health: bool = False

    def check(self) -> None:
        """Raise where the matrix, the selection, the numerics or the dataset's name is wrong."""
        matrix, _ = self.plan()
        open_store(self.store).dataset(self.dataset or matrix.name)

    def plan(self) -> tuple[MatrixSpec, list[CohortPlan]]:
        """Return the matrix and its cohorts, under the numerics in which they will run."""
        matrix, plans = plan_matrix(self.matrix, self.selection)
        return matrix, under_numerics(plans, self.devices, self.numerics)


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
    """

    version: Version
    sealed: bool
    new_episodes: int
    failed_episodes: int
    alone_epochs: int
    computed_epochs: int

    @property
    def ratio(self) -> float | None:
        """Host epochs alone over computed, None where nothing was computed."""
        return self.alone_epochs / self.computed_epochs if self.computed_epochs else None


def estimate_datagen(request: DatagenRequest) -> Estimate:
    """Return what the request costs, running nothing and writing nothing."""
    matrix, plans = request.plan()
    return estimate(plans, open_store(request.store).dataset(request.dataset or matrix.name))


def worker_memory(request: DatagenRequest) -> MemoryBound:
    """Return what a worker holds at most, in the cohort of the request that needs most; runs nothing."""
    from esper.tolaria.memory import cohort_memory  # torch

    _, plans = request.plan()
    bounds = [cohort_memory(part) for plan in plans for part in slices(plan, request.max_lineages)]
    return max(bounds, key=lambda bound: bound.total_bytes)


def run_datagen(request: DatagenRequest, orchestrator: Orchestrator) -> Generated:
    """Carry out a request; what is stored already is left out.

    Raises:
        SpecError: The matrix, the selection, a device or the numerics are wrong.
        StoreError: The store cannot be written.
    """
    matrix, plans = request.plan()
    dataset = request.dataset or matrix.name
    with open_context(request, dataset, "datagen", orchestrator, events={"matrix": matrix.name}) as context:
        generated = generate(
            context, matrix, plans, retry_failed=request.retry_failed, max_lineages=request.max_lineages
        )
        if request.health and generated.version.verdict() is None:
            orchestrator.stage("health", partial(check_health, context, generated.version))
        return generated


def generate(
    context: Context,
    matrix: MatrixSpec,
    plans: Sequence[CohortPlan],
    *,
    retry_failed: bool = False,
    max_lineages: int | None = None,
) -> Generated:
    """Run the cohorts that are not stored yet, commit each as it ends, and seal a version that holds them all.

    Where `max_lineages` is given, a large cohort runs as several smaller ones; the version's digest stays the same.
    A cohort is tried twice; one with branches then runs again in parts, so that a branch that cannot be carried out
    costs the others nothing. What still fails is stored as failed, with the error, and the rest goes on.
    """
    todo = remaining(plans, context.dataset.episode_ids(failed=not retry_failed))
    done: list[CohortDone] = []
    failed = 0
    parts = [part for plan in todo for part in slices(plan, max_lineages)]
    with _explain_interrupt(context, parts, done):
        while parts:
            again: list[CohortPlan] = []
            for index, outcome in _run_cohorts(context, parts):
                if isinstance(outcome, StoreError | IntegrityError):
                    raise outcome
                if not isinstance(outcome, Exception):
                    done.append(outcome)
                elif parts[index].branches and parts[index].num_planned > 1:
                    again += one_by_one(parts[index])
                else:
                    failed += _record_failure(context, parts[index], outcome)
            parts = again
    alone = sum(item.alone_epochs for item in done)
    computed = sum(item.computed_epochs for item in done)
    measured: dict[str, JsonValue] = {
        "alone": alone,
        "computed": computed,
        "least": sum(epochs_per_episode(plan) for plan in todo),
        "ratio": alone / computed if computed else None,
    }
    before = context.dataset.version_numbers()
    version = None if todo else latest_with(context.dataset, plans)
    if version is None:
        origin = _with_earlier(context.dataset, provenance(matrix, plans, measured))
        version = context.dataset.seal(matrix_id=matrix.spec_id, provenance=origin)
    sealed = version.number not in before
    return Generated(version, sealed, sum(item.episodes for item in done), failed, alone, computed)


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


def _run_cohorts(context: Context, todo: Sequence[CohortPlan]) -> Iterator[tuple[int, CohortDone | Exception]]:
    context.progress.begin("cohorts", len(todo))
    units = [Unit("cohort", cohort_name(plan), partial(_run_cohort, context, plan), retries=1) for plan in todo]
    for index, outcome in context.orchestrator.units(units):
        failed = isinstance(outcome, Exception)
        context.progress.advance("cohorts", f"{cohort_name(todo[index])}{' failed' if failed else ''}")
        yield index, outcome


def _run_cohort(context: Context, plan: CohortPlan) -> CohortDone:
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
def _explain_interrupt(context: Context, todo: Sequence[CohortPlan], done: Sequence[CohortDone]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            f"interrupted: {len(done)} of {len(todo)} cohorts are stored in {context.dataset.path}; "
            "the same command goes on with the rest"
        )
        raise
