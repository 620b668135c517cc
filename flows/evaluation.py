"""Evaluation: every policy and every control on held-out environment seeds, paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.comparison import Evaluation
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import ControlError, SpecError, StoreError
from esper.leyline.events import EventKind
from esper.leyline.library import load
from esper.leyline.matrix import ControlBounds, EvaluationCell, PipelineSpec
from esper.leyline.verdict import Use
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator

RESULT = "evaluation.json"


class EvaluateRequest(RunOptions):
    """Compare checkpoints on the evaluation cells of a pipeline; the episodes join the dataset."""

    dataset: str
    policies: tuple[str, ...]
    pipeline: str = "demo"

    def check(self) -> None:
        """Raise where the pipeline, a checkpoint or the version does not exist."""
        self.resolve()

    def resolve(self) -> tuple[PipelineSpec, dict[str, LearnedPolicy], Version]:
        """Return what the names stand for."""
        spec = load("pipelines", self.pipeline, PipelineSpec)
        return spec, _named_policies(self.policies), open_store(self.store).resolve(self.dataset)


def run_evaluation(request: EvaluateRequest, orchestrator: Orchestrator) -> tuple[Evaluation, Path]:
    """Return the comparison and the file that holds it."""
    spec, policies, version = request.resolve()
    with open_context(request, version.name, "evaluate", orchestrator, events={"version": version.ref}) as context:
        evaluation = evaluate_policies(context, version, spec.evaluation, spec.controls, policies)
        return evaluation, context.folder / RESULT


def _named_policies(folders: Sequence[str]) -> dict[str, LearnedPolicy]:
    """The policies of checkpoint folders by name; before anything runs, so that a missing one costs nothing."""
    from esper.tamiyo.checkpoints import read_card

    policies: dict[str, LearnedPolicy] = {}
    for folder in folders:
        card = read_card(Path(folder))
        if card.name in policies:
            raise SpecError(f"two policies are called {card.name!r}: {policies[card.name].path} and {folder}")
        policies[card.name] = LearnedPolicy(name=card.name, path=folder, digest=card.weights_sha256)
    return policies


def evaluate_policies(
    context: Context,
    version: Version,
    cells: Sequence[EvaluationCell],
    bounds: Sequence[ControlBounds],
    policies: Mapping[str, LearnedPolicy],
) -> Evaluation:
    """Compare policies with the controls and write `evaluation.json` into the run's folder."""
    from esper.simic.evaluation import evaluate

    verdict = version.verdict()
    context.progress.begin("evaluation", sum(cell.env_seeds + cell.selection_seeds for cell in cells))
    evaluation = evaluate(
        cells,
        policies,
        run=partial(context.run_plans, "evaluation", counted=True),
        bounds=bounds,
        dataset=version.name,
        version=version.number,
        verdict=None if verdict is None else verdict.level(Use.OFFLINE_RL),
        on_tables=lambda tables: None,  # each cohort was stored as it ended
    )
    path = context.folder / RESULT
    try:
        path.write_text(json.dumps(evaluation.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    context.events.emit(EventKind.EVALUATED, {"arms": len(evaluation.arms), "wall_s": evaluation.wall_s})
    return evaluation


def require_controls(evaluation: Evaluation) -> None:
    """Raise ControlError where a positive or negative control failed."""
    failed = evaluation.failed_controls
    if failed:
        lines = "\n".join(
            f"  {item.environment}: {item.name}: {item.value:.2f}, expected {item.low:g} to {item.high:g}"
            for item in failed
        )
        raise ControlError(f"{len(failed)} controls of the run failed: the engine or the task is wrong\n{lines}")
