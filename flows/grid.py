"""`esper train` as one flow: every recipe of a grid with every seed is a task of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from esper.karn.overrides import check_reason
from esper.karn.splits_stored import DEFAULT_NAME, find_split
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import EsperError, SpecError, StoreError
from esper.leyline.grid import (
    POLICY_NAME,
    Algorithm,
    Backend,
    GridPoint,
    GridSpec,
    TrainedPolicy,
    TrainingTable,
    default_name,
    merged,
)
from esper.leyline.imitation import ImitationResult
from esper.leyline.library import load, load_environments
from esper.leyline.pipelines import PipelineSpec
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import Use
from flows.context import Context, RunOptions, open_context
from flows.imitation import judge_imitation, rules_named
from flows.ope import ope_scores
from flows.orchestration import Orchestrator
from flows.selection import Selected, select_policies
from flows.training import TrainJob, make_job, train_rows
from flows.versions import refuse_skeleton

RESULT = "training.json"
DEFAULT_GRID = "offline"
MIN_LIVE_SEEDS = 2


class TrainRequest(RunOptions):
    """Train offline learners on `NAME` or `NAME@n`.

    Attributes:
        dataset: The data.
        algorithm: The learner; None takes every learner of the grid.
        backend: Whose implementation of it; a grid says its own.
        recipe: Name or TOML file of the recipe; the one of the learner's name unless given.
        grid: Name or TOML file of a grid, in place of a recipe.
        seeds: Training seeds; each recipe is trained with each.
        name: The policy's name; a grid names its own.
        patience: Measurements without a lower held-out loss before a learner stops; None leaves it to the recipe.
        split: Name of the stored split whose validation seeds are held out.
        override_health: Why to train without a verdict, or against it.
        tensorboard: Write the losses for TensorBoard too.
        live_env_seeds: Of an imitation policy beside its heuristic; 0 for none.
        heuristic: The rule beside it.
        select: Rank the policies by off-policy evaluation, try the first few on live selection episodes, and report
            the winner on held-out environment seeds.
        pipeline: Where that happens: the evaluation cells of this pipeline.
    """

    dataset: str
    algorithm: Algorithm | None = None
    backend: Backend = "esper"
    recipe: str | None = None
    grid: str | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    name: Annotated[str, Field(pattern=POLICY_NAME)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    split: str = DEFAULT_NAME
    override_health: str | None = None
    tensorboard: bool = False
    live_env_seeds: Annotated[int, Field(ge=0)] = 0
    heuristic: str | None = None
    select: bool = False
    pipeline: str = "demo"

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {' '.join(map(str, self.seeds))}: one is named twice")
        beside = {
            "recipe": self.recipe,
            "name": self.name,
            "backend": self.backend if self.backend != "esper" else None,
        }
        given = [key for key, value in beside.items() if value is not None]
        if (self.grid is not None or self.algorithm is None) and given:
            raise ValueError(f"--{given[0]} has no effect on a grid, whose learners say it themselves")
        return self

    def points(self) -> list[GridPoint]:
        """Return the policies to train with each seed."""
        if self.grid is None and self.algorithm is not None:
            name = self.name or default_name(self.algorithm, self.backend)
            points = [GridPoint(name, self.algorithm, self.backend, self.recipe, {})]
        else:
            points = load("grids", self.grid or DEFAULT_GRID, GridSpec).points(self.algorithm)
        if self.patience is None:
            return points
        early = {"patience": self.patience}
        return [GridPoint(p.name, p.algorithm, p.backend, p.recipe, merged(p.changes, early)) for p in points]

    def check(self) -> None:
        """Raise where a name is unknown, a recipe is wrong, or the reason for the override says nothing."""
        from esper.simic.training import load_recipe

        if self.override_health is not None:
            check_reason(self.override_health)
        if self.heuristic is not None:
            rules_named(self.heuristic)
        version = open_store(self.store).resolve(self.dataset)
        refuse_skeleton(version)
        if self.split != DEFAULT_NAME:
            find_split(version, self.split)
        if self.select:
            for cell in load("pipelines", self.pipeline, PipelineSpec).evaluation:
                load_environments(cell.environment)
                load("rewards", cell.reward, RewardSpec)
        points = self.points()
        for point in points:
            load_recipe(point.algorithm, point.backend, point.recipe, point.changes)
        if self.live_env_seeds and (len(points) * len(self.seeds) > 1 or self.live_env_seeds < MIN_LIVE_SEEDS):
            raise SpecError(
                f"{self.live_env_seeds} live environment seeds for {len(points) * len(self.seeds)} policies\n"
                f"  expected: one policy, and at least {MIN_LIVE_SEEDS} seeds or 0 for no live comparison"
            )


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves: where they were asked for, the imitation policy's judgement and the selection."""

    table: TrainingTable
    imitation: ImitationResult | None = None
    selected: Selected | None = None


def run_training(request: TrainRequest, orchestrator: Orchestrator) -> TrainingResult:
    """Train every policy that the request names, and write `training.json` into the run's folder.

    Raises:
        HealthError: The version is blocked or was never checked, and there is no `override_health`.
        EsperError: A training failed; the others ended and are stored.
    """
    version = open_store(request.store).resolve(request.dataset)
    command = "train" if request.algorithm is None else f"train-{request.algorithm}"
    events: dict[str, Any] = {"version": version.ref, "grid": request.grid, "seeds": list(request.seeds)}
    with open_context(request, version.name, command, orchestrator, events=events) as context:
        try:
            result = TrainingResult(train_grid(context, version, request))
            if request.algorithm == "imitate" and len(result.table.rows) == 1:
                policy = result.table.rows[0].policy
                judged = judge_imitation(context, version, policy, request.live_env_seeds, request.heuristic)
                result = replace(result, imitation=judged)
            if request.select:
                result = replace(result, selected=_select(context, version, result.table, request.pipeline))
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_go_on("interrupted", context))
            raise
        return result


def train_grid(context: Context, version: Version, request: TrainRequest) -> TrainingTable:
    """Train a request's policies within a context's run, one unit for each recipe and seed; write the table.

    Raises:
        HealthError: The version is blocked or was never checked, and there is no `override_health`.
        EsperError: A training failed; the others ended and are stored.
    """
    jobs = _jobs(context, version, request)
    _admit(version, jobs, request)
    try:
        rows = train_rows(context, jobs)
    except EsperError as error:
        if len(jobs) > 1:
            raise type(error)(f"{error}\n  {_go_on('the other policies are stored', context)}") from error
        raise
    return _write(context, version, rows)


def _select(context: Context, version: Version, table: TrainingTable, pipeline: str) -> Selected:
    """The table's policies by evidence; under Prefect, a flow run for the estimates and one for the live episodes."""
    policies = {row.policy.name: row.policy for row in table.rows}
    spec = load("pipelines", pipeline, PipelineSpec)
    scores = context.orchestrator.stage("ope", partial(ope_scores, context, version, policies))
    return context.orchestrator.stage("select", partial(select_policies, context, version, policies, scores, spec))


def _jobs(context: Context, version: Version, request: TrainRequest) -> list[TrainJob]:
    """Every recipe with every seed, seeds fastest."""
    many = len(request.seeds) > 1
    return [
        make_job(
            context,
            version,
            point.algorithm,
            seed,
            f"{point.name}-s{seed}" if many else point.name,
            request.override_health,
            backend=point.backend,
            recipe=point.recipe,
            changes=point.changes,
            split=request.split,
            tensorboard=request.tensorboard,
        )
        for point in request.points()
        for seed in request.seeds
    ]


def _admit(version: Version, jobs: list[TrainJob], request: TrainRequest) -> None:
    """Raise once what every worker would raise; where a reason overrides it, the workers record it themselves."""
    from esper.simic.training import USES, admit

    if request.override_health is None:
        for use in sorted({USES[job.algorithm] for job in jobs}):
            admit(version, use, None, by="train")
    if request.select:
        admit(version, Use.OFF_POLICY_EVALUATION, request.override_health, by="train --select")


def _write(context: Context, version: Version, rows: list[TrainedPolicy]) -> TrainingTable:
    table = TrainingTable(run=context.run, dataset=version.ref, folder=str(context.folder), rows=tuple(rows))
    path = Path(table.folder) / RESULT
    try:
        path.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    return table


def _go_on(what: str, context: Context) -> str:
    return f"{what}; the same command with --run-name {context.run} goes on from there"
