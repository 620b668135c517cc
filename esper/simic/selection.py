"""Selection by evidence: policies ranked by off-policy evaluation, the first few tried on live selection episodes.

Two stages, as in Tang and Wiens 2021: estimates prune, live episodes decide. The seeds that decide are not those on
which the winner is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esper.leyline.comparison import Interval, PolicySelection, Trial
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.identity import SELECTION_START, Role
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.pipelines import EvaluationCell
from esper.simic.arms import Arm
from esper.simic.contest import Contest, Outcomes, Runner, carry_out, contest, open_field
from esper.simic.statistics import mean_interval

NUM_TRIED = 3


def select(
    cells: Sequence[EvaluationCell],
    policies: Mapping[str, LearnedPolicy],
    predicted: Mapping[str, float],
    *,
    run: Runner,
    dataset: str,
    version: int,
    num_tried: int = NUM_TRIED,
) -> PolicySelection:
    """Return which policy live selection episodes favour among the best by prediction.

    All of them meet on the same environment seeds, `selection_seeds` of each cell; what counts is the mean over the
    cells of the mean return.

    Args:
        cells: Where the policies are tried.
        policies: Policies by name; they act by their argmax.
        predicted: What off-policy evaluation says of each.
        run: Carries out cohorts.
        dataset: Name of the dataset that the policies learned from.
        version: Its version.
        num_tried: How many of them, the best first, are tried.

    Raises:
        SpecError: Nothing to choose from, or a policy without a finite prediction.
        ControlError: Fewer than two environment seeds of a cell have a valid control.
    """
    order = _ranked(policies, predicted)
    tried = order[:num_tried]
    arms = [_arm(name, policies[name]) for name in tried]
    contests = [
        contest(open_field(cell), lambda member: arms, range(SELECTION_START, SELECTION_START + cell.selection_seeds))
        for cell in cells
    ]
    outcomes = carry_out(contests, run, lambda tables: None)
    live = {name: _live(name, contests, outcomes) for name in tried}
    means = {name: float(np.mean([interval.mean for interval in found.values()])) for name, found in live.items()}
    candidates = tuple(
        Trial(
            policy=name,
            predicted_return=predicted[name],
            live_return=means.get(name),
            live_by_environment=live.get(name, {}),
        )
        for name in order
    )
    return PolicySelection(
        dataset=dataset,
        version=version,
        candidates=candidates,
        winner=max(tried, key=lambda name: means[name]),
        num_selection_seeds=min(found.num_env_seeds for found in outcomes),
    )


def _arm(name: str, policy: LearnedPolicy) -> Arm:
    greedy = policy.model_copy(update={"sampled": False})
    return Arm(name=name, group="learned", episode=PlannedEpisode(controller=greedy, role=Role.SELECTION))


def _ranked(policies: Mapping[str, LearnedPolicy], predicted: Mapping[str, float]) -> list[str]:
    """The names, best prediction first; of equal ones the first by name."""
    if not policies:
        raise SpecError("there is no policy to select from\n  expected: at least one trained policy")
    for name in policies:
        if not np.isfinite(predicted.get(name, np.nan)):
            raise SpecError(
                f"policy {name!r} has the prediction {predicted.get(name)}\n"
                "  expected: a finite number from off-policy evaluation for every policy"
            )
    return sorted(policies, key=lambda name: (-predicted[name], name))


def _live(name: str, contests: Sequence[Contest], outcomes: Sequence[Outcomes]) -> dict[str, Interval]:
    return {
        held.field.name: mean_interval(found.values(name, "episode_return"), key=("selection", held.field.name, name))
        for held, found in zip(contests, outcomes)
    }
