"""`esper train --select`: the grid's policies by evidence, and the winner on held-out seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esper.karn.comparison_page import comparison_page, selection_page
from esper.karn.versions import Version
from esper.leyline.comparison import Evaluation, PolicySelection
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.library import load_environments
from esper.leyline.pipelines import PipelineSpec
from flows.context import Context
from flows.evaluation import evaluate_policies, write_result
from flows.stored_runs import StoredRuns

RESULT = "selection.json"
PAGE = "selection.md"


@dataclass(frozen=True)
class Selected:
    """What a selection leaves: its record, the winner's comparison with every control, and the page of both."""

    selection: PolicySelection
    evaluation: Evaluation
    page: Path


def select_policies(
    context: Context,
    version: Version,
    policies: Mapping[str, LearnedPolicy],
    ope_scores: Mapping[str, float],
    pipeline: PipelineSpec,
) -> Selected:
    """Try the best three by prediction on live selection episodes, and report the winner on held-out seeds.

    Writes `selection.json`, `selection.md` and the winner's `evaluation.json` into the run's folder. No other policy
    meets an evaluation seed.

    Args:
        context: The run.
        version: The data that the policies learned from.
        policies: Policies by name.
        ope_scores: What off-policy evaluation says of each.
        pipeline: Where they are tried and reported: its evaluation cells and its controls.

    Raises:
        SpecError: No policy, or one without a finite score.
        ControlError: Fewer than two environment seeds of a cell have a valid control.
    """
    from esper.simic.arms import COLUMNS
    from esper.simic.selection import select

    cells = pipeline.evaluation
    num_cohorts = sum(cell.selection_seeds * len(load_environments(cell.environment)) for cell in cells)
    context.progress.begin("selection", num_cohorts)
    selection = select(
        cells,
        policies,
        ope_scores,
        run=partial(StoredRuns(context, COLUMNS).run, "selection"),
        dataset=version.name,
        version=version.number,
    )
    write_result(context.folder / RESULT, selection.model_dump_json(indent=1) + "\n")
    winner = {selection.winner: policies[selection.winner]}
    evaluation = evaluate_policies(context, version, cells, pipeline.controls, winner)
    page = context.folder / PAGE
    write_result(page, f"{selection_page(selection)}\n{comparison_page(evaluation)}")
    return Selected(selection, evaluation, page)
