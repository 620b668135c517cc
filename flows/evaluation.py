"""Evaluation: every policy and every control on held-out environment seeds, paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from esper.karn.comparison_page import comparison_page
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.comparison import Evaluation
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import ControlError, StoreError
from esper.leyline.events import EventKind
from esper.leyline.library import load, load_environments
from esper.leyline.pipelines import ControlBounds, EvaluationCell, PipelineSpec
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import Use
from flows.artifacts import publish_comparison
from flows.checkpoints import named_policies
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator, under_prefect
from flows.stored_runs import StoredRuns
from flows.versions import refuse_skeleton

RESULT = "evaluation.json"
PAGE = "evaluation.md"


class EvaluateRequest(RunOptions):
    """Compare checkpoints on the evaluation cells of a pipeline; the episodes join the dataset."""

    dataset: str
    policies: tuple[str, ...]
    pipeline: str = "demo"

    def check(self) -> None:
        """Raise where the pipeline, what it evaluates on, a checkpoint or the version does not exist."""
        spec, _, _ = self.resolve()
        for cell in spec.evaluation:
            load_environments(cell.environment)
            load("rewards", cell.reward, RewardSpec)

    def resolve(self) -> tuple[PipelineSpec, dict[str, LearnedPolicy], Version]:
        """Return what the names stand for."""
        spec = load("pipelines", self.pipeline, PipelineSpec)
        policies = named_policies(self.policies)
        version = open_store(self.store).resolve(self.dataset)
        refuse_skeleton(version)
        return spec, policies, version


def run_evaluation(request: EvaluateRequest, orchestrator: Orchestrator) -> tuple[Evaluation, Path]:
    """Return the comparison and the file that holds it."""
    spec, policies, version = request.resolve()
    with open_context(request, version.name, "evaluate", orchestrator, events={"version": version.ref}) as context:
        evaluation = evaluate_policies(context, version, spec.evaluation, spec.controls, policies)
        return evaluation, context.folder / RESULT


def evaluate_policies(
    context: Context,
    version: Version,
    cells: Sequence[EvaluationCell],
    bounds: Sequence[ControlBounds],
    policies: Mapping[str, LearnedPolicy],
) -> Evaluation:
    """Compare policies with the controls; write `evaluation.json` and `evaluation.md` into the run's folder.

    Episodes that the dataset holds already are not run again, so further policies cost no further controls. Beside
    each policy stands what the newest off-policy evaluation of it said, if there was one.
    """
    from esper.simic.arms import COLUMNS
    from esper.simic.evaluation import evaluate

    verdict = version.verdict()
    context.progress.begin("evaluation", sum(num_cohorts(cell) for cell in cells))
    evaluation = evaluate(
        cells,
        policies,
        run=partial(StoredRuns(context, COLUMNS).run, "evaluation"),
        bounds=bounds,
        dataset=version.name,
        version=version.number,
        verdict=None if verdict is None else verdict.level(Use.OFFLINE_RL),
        on_tables=lambda tables: None,  # each cohort was stored as it ended
        predicted=predictions(context, policies),
    )
    write_result(context.folder / RESULT, json.dumps(evaluation.model_dump(mode="json"), indent=1) + "\n")
    write_result(context.folder / PAGE, comparison_page(evaluation))
    if under_prefect(context.orchestrator):
        publish_comparison(evaluation, context.folder / PAGE)
    context.events.emit(EventKind.EVALUATED, {"arms": len(evaluation.arms), "wall_s": evaluation.wall_s})
    return evaluation


def num_cohorts(cell: EvaluationCell) -> int:
    """Return how many cohorts a cell's evaluation takes: selection, bandit, comparison."""
    members = len(load_environments(cell.environment))
    return members * (cell.env_seeds + cell.selection_seeds) + (0 if cell.bandit is None else cell.bandit.pulls)


def predictions(context: Context, policies: Mapping[str, LearnedPolicy]) -> dict[str, dict[str, float]]:
    """Return what the newest off-policy evaluation of each policy said, by policy and environment."""
    from flows.past_estimates import stored_results

    by_digest: dict[str, dict[str, float]] = {}
    for result in stored_results(context.dataset):
        newest: dict[str, dict[str, float]] = {}
        for item in result.policies:
            if not item.sampled:
                newest.setdefault(item.digest, {})[item.environment] = item.fqe.mean
        by_digest |= newest
    return {name: by_digest[policy.digest] for name, policy in policies.items() if policy.digest in by_digest}


def write_result(path: Path, text: str) -> None:
    """Write a file of results; StoreError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def require_controls(evaluation: Evaluation) -> None:
    """Raise ControlError where a positive or negative control failed."""
    failed = evaluation.failed_controls
    if failed:
        lines = "\n".join(
            f"  {item.environment}: {item.name}: {item.value:.2f}, expected {item.low:g} to {item.high:g}"
            for item in failed
        )
        raise ControlError(f"{len(failed)} controls of the run failed: the engine or the task is wrong\n{lines}")
