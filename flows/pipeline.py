"""The pipeline: matrix, cohorts, sealed version, health, offline learners, PPO, comparison, controls, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from esper.karn.kinds import refuse_mixture
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.comparison import Evaluation
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.grid import GridPoint, GridSpec
from esper.leyline.library import load, load_environments
from esper.leyline.matrix import CohortPlan, MatrixSpec
from esper.leyline.pipelines import PipelineSpec
from esper.leyline.rewards import RewardSpec
from flows.context import Context, RunOptions, open_context
from flows.datagen import Generated, generate
from flows.evaluation import evaluate_policies
from flows.health import check_health, require_offline_rl
from flows.orchestration import Orchestrator
from flows.planning import plan_matrix
from flows.report import write_report
from flows.training import fine_tune_policy, make_job, train_all

T = TypeVar("T")


class PipelineRequest(RunOptions):
    """Run a pipeline, by name or TOML file; `matrix` takes the place of the pipeline's own."""

    pipeline: str = "demo"
    matrix: str | None = None

    def check(self) -> None:
        """Raise where a name in the request, the pipeline or its matrix is unknown."""
        self.resolve()

    def resolve(self) -> tuple[PipelineSpec, MatrixSpec, list[CohortPlan]]:
        """Return the pipeline, the matrix and its cohorts."""
        spec = load("pipelines", self.pipeline, PipelineSpec)
        for cell in spec.evaluation:
            load_environments(cell.environment)
            load("rewards", cell.reward, RewardSpec)
        _points(spec)
        matrix, plans = plan_matrix(self.matrix or spec.matrix)
        refuse_mixture(open_store(self.store).dataset(matrix.name), skeleton=False)
        return spec, matrix, plans


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline leaves: the version that holds every episode, the comparison and the report."""

    generated: Generated
    version: Version
    evaluation: Evaluation
    report: Path


def run_pipeline(request: PipelineRequest, orchestrator: Orchestrator) -> PipelineResult:
    """Carry out a pipeline; stages whose episodes are stored already cost next to nothing.

    Failed controls do not raise here: the report must be written first (see `require_controls`).

    Raises:
        HealthError: The data are blocked for offline RL; the version and its verdict are stored.
    """
    spec, matrix, plans = request.resolve()
    with open_context(request, matrix.name, "pipeline", orchestrator, events={"pipeline": spec.name}) as context:
        generated = _stage(context, "datagen", partial(generate, context, matrix, plans))
        version = generated.version
        checked = _stage(context, "health", partial(check_health, context, version))
        require_offline_rl(checked.verdict)
        policies = _stage(context, "train", partial(_train, context, spec, version))
        if spec.ppo is not None:
            name = f"{spec.ppo_from}-ppo"
            start = policies[_name(spec, spec.ppo_from, spec.training_seed)]
            tune = partial(fine_tune_policy, context, version, start, spec.ppo, spec.training_seed, name)
            policies[name] = _stage(context, "fine-tune", tune)
        compare = partial(evaluate_policies, context, version, spec.evaluation, spec.controls, policies)
        evaluation = _stage(context, "evaluate", compare)
        everything = _stage(context, "seal", partial(_seal_everything, context, matrix, version))
        report = _stage(context, "report", partial(write_report, context, everything, evaluation))
        return PipelineResult(generated, everything, evaluation, report)


def _seal_everything(context: Context, matrix: MatrixSpec, version: Version) -> Version:
    """A version that holds the live and the evaluation episodes too, with a verdict of its own."""
    provenance = {**version.manifest.provenance, "grown_from": version.ref}
    everything = context.dataset.seal(matrix_id=matrix.spec_id, provenance=provenance)
    if everything.number != version.number:
        check_health(context, everything)
    return everything


def _stage(context: Context, name: str, work: Callable[[], T]) -> T:
    return context.orchestrator.stage(name, work)


def _train(context: Context, spec: PipelineSpec, version: Version) -> dict[str, LearnedPolicy]:
    """The offline learners from every controller seed, PPO's start first."""
    seeds = range(spec.training_seed, spec.training_seed + spec.controller_seeds)
    wanted = [(point, seed, _name(spec, point.name, seed)) for point in _points(spec) for seed in seeds]
    order = sorted(wanted, key=lambda item: spec.ppo is None or item[0].name != spec.ppo_from)
    jobs = [
        make_job(
            context,
            version,
            point.algorithm,
            seed,
            name,
            backend=point.backend,
            recipe=point.recipe,
            changes=point.changes,
        )
        for point, seed, name in order
    ]
    trained = dict(zip([job.name for job in jobs], train_all(context, jobs), strict=True))
    return {name: trained[name] for _, _, name in wanted}


def _points(spec: PipelineSpec) -> list[GridPoint]:
    """What is trained from each controller seed."""
    if spec.grid is not None:
        return load("grids", spec.grid, GridSpec).points()
    return [GridPoint(name, name, "esper", None, {}) for name in spec.algorithms]


def _name(spec: PipelineSpec, learner: str, seed: int) -> str:
    return f"{learner}-s{seed}" if spec.controller_seeds > 1 else learner
