"""The proof of concept: growing against not growing on paired environment seeds. What is stored is never run again."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from esper.karn.poc_page import check_page, update_poc_page
from esper.leyline.errors import unknown_name
from esper.leyline.matrix import CohortPlan
from esper.leyline.poc import PocFile, PocTable, RunOrigin, Study
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec
from esper.simic.poc import poc_table
from esper.simic.poc_arms import (
    GROWTH_REFERENCES,
    PocArm,
    bigger_flops_per_epoch,
    growth_arms,
    middle_slot,
    plan_arms,
    published_life,
)
from esper.simic.poc_sunk_cost import SUNK_COST_REFERENCES, sunk_cost_arms
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator
from flows.planning import remaining
from flows.provenance import machine
from flows.sizes import Sizes, sized_environment
from flows.stored import stored_episodes

DATASET = "poc"


class StudyRequest(Spec):
    """One study on one environment."""

    study: Study
    task: str
    sizes: Sizes = Sizes()
    arms: tuple[str, ...] | None = None
    """Only these, and the references to which they are compared; left out, all."""
    warm_epochs: Annotated[int, Field(ge=1)] = 20
    further_epochs: Annotated[int, Field(ge=5)] = 6
    """A seed's whole life within the further epochs takes five."""

    def environment(self) -> EnvironmentSpec:
        """Return the environment with its sizes replaced."""
        return sized_environment(self.task, self.sizes)


class PocRequest(RunOptions):
    """Studies, one after another; `out` is the page, raw values lie in the JSON file beside it."""

    studies: Annotated[tuple[StudyRequest, ...], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=2)] = 8
    data: str | None = None
    out: str = "docs/results/poc.md"

    def check(self) -> None:
        """Raise where an environment is unknown, a size or a life does not fit it, or the page cannot be written."""
        for study in self.studies:
            environment = study.environment()
            if study.study == "growth":
                published_life(environment.horizon)
        check_page(Path(self.out), PocFile)


@dataclass(frozen=True)
class Prepared:
    """A study that is ready to run: its data were found."""

    request: StudyRequest
    environment: EnvironmentSpec
    arms: tuple[PocArm, ...]
    references: tuple[str, ...]
    notes: tuple[str, ...]


def run_poc(request: PocRequest, orchestrator: Orchestrator) -> list[PocTable]:
    """Carry out the studies; each table is on the page as soon as it is complete.

    Raises:
        SpecError: An environment or a size is wrong.
        StoreError: The store or the page cannot be written.
    """
    use_data_folder(request.data)
    prepared = [_prepare(study) for study in request.studies]
    names = [f"{study.study} {study.task}" for study in request.studies]
    with open_context(request, DATASET, "poc", orchestrator, events={"studies": ", ".join(names)}) as context:
        return [_carry_out(context, request, study) for study in prepared]


def use_data_folder(folder: str | None) -> None:
    """Make `--data` known here and to every worker that starts from now on."""
    if folder is not None:
        from esper.tolaria.tasks import set_data_folder

        set_data_folder(Path(folder))


def _prepare(request: StudyRequest) -> Prepared:
    environment = request.environment()
    if request.study == "sunk-cost":
        arms = sunk_cost_arms(environment, request.warm_epochs, request.further_epochs)
        note = (
            f"The host was trained for {request.warm_epochs} epochs on a `step` schedule of its own; then every arm's "
            "learning rate starts anew. Operations, epochs and CPU seconds are those after that."
        )
        return _selected(request, environment, arms, SUNK_COST_REFERENCES, note)
    from esper.tolaria.cost import wider_factor

    factor = wider_factor(environment, bigger_flops_per_epoch(environment, [middle_slot(environment)]))
    life = published_life(environment.horizon)
    note = (
        f"All arms train for {environment.horizon} epochs on the same batches. The drop is a tenth of the learning "
        f"rate from epoch {life.drop_epoch} on. Our two schedules were declared beforehand, not chosen among others."
    )
    return _selected(request, environment, growth_arms(environment, factor), GROWTH_REFERENCES, note)


def _selected(
    request: StudyRequest, environment: EnvironmentSpec, arms: Sequence[PocArm], references: tuple[str, ...], note: str
) -> Prepared:
    """Return the study with the arms asked for."""
    known = [arm.name for arm in arms]
    for name in request.arms or ():
        if name not in known:
            raise unknown_name(f"arm of {request.study}", name, known)
    wanted = known if request.arms is None else (*request.arms, *references)
    chosen = tuple(arm for arm in arms if arm.name in wanted)
    return Prepared(request, environment, chosen, references, (note,))


def _carry_out(context: Context, request: PocRequest, study: Prepared) -> PocTable:
    started = time.monotonic()
    plans = plan_arms(study.arms, request.seeds)
    run_missing(context, f"{study.request.study} {study.request.task}", plans)
    ids = {name for plan in plans for name in plan.planned_ids()}
    table = poc_table(
        study.request.study,
        study.environment,
        study.arms,
        study.references,
        num_seeds=request.seeds,
        episodes=stored_episodes(context.dataset, ids),
        notes=study.notes,
        origin=run_origin(study.environment, command_line(request, study.request), started),
    )
    update_poc_page(Path(request.out), table)
    return table


def run_missing(context: Context, name: str, plans: Sequence[CohortPlan]) -> None:
    """Run and store what the dataset does not hold yet; the first error is raised once all have ended."""
    todo = remaining(plans, context.dataset.episode_ids(failed=False))
    context.progress.begin(name, len(todo))
    context.run_plans(name, todo, counted=True)


def run_origin(environment: EnvironmentSpec, command: str, started: float) -> RunOrigin:
    """Return where a table comes from; `started` is the monotonic time at which its study began."""
    from esper.tolaria.runtime import code_commit
    from esper.tolaria.tasks import load_task

    data = load_task(environment.task)
    return RunOrigin(
        command=command,
        machine=machine(),
        code_commit=code_commit(),
        source=data.source,
        digest=data.digest,
        ended_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        wall_s=time.monotonic() - started,
    )


def command_line(request: PocRequest, study: StudyRequest) -> str:
    """Return the command that makes one table."""
    parts = [f"esper poc {study.study} --task {study.task} --seeds {request.seeds}"]
    parts += given_flags(request, "data", "store")
    parts += given_flags(study.sizes, *Sizes.model_fields)
    if study.arms is not None:
        parts.append(f"--arms {' '.join(study.arms)}")
    if study.study == "sunk-cost":
        parts.append(f"--warm-epochs {study.warm_epochs} --further-epochs {study.further_epochs}")
    return " ".join([*parts, f"--workers {request.workers} --out {request.out}"])


def given_flags(spec: Spec, *names: str) -> list[str]:
    """Return the flags of the fields that were given."""
    values = {name: getattr(spec, name) for name in names}
    return [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None]
