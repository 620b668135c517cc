"""What co-adaptation is worth: one seed's life replayed with and without the host seeing the seed's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper.leyline.actions import ISOLATIONS, WAIT_ROW, Isolation, Op
from esper.leyline.errors import LifecycleError, SpecError
from esper.tolaria.cohort import Cohort
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import Outcome

_OP, _ISOLATION = 0, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class CoadaptationDelta:
    """Two lives that differ in one lever alone, from the same state on: co-adapting and isolated.

    Attributes:
        points: Final validation accuracy of the committed network, co-adapting minus isolated, points.
        uncommitted_points: The same with every blended seed left in.
        coadapting_accuracies: Validation accuracy after each epoch from the germination on, fractions.
        isolated_accuracies: The same of the isolated life.
        same_actions: Whether both lives carried out the same actions; where a measured gate refused one in one life
            alone, they differ in more than the lever.
    """

    points: float
    uncommitted_points: float
    coadapting_accuracies: tuple[float, ...]
    isolated_accuracies: tuple[float, ...]
    same_actions: bool


def coadaptation_delta(cohort: Cohort, episode: int, step: int) -> CoadaptationDelta:
    """Return what co-adapting brought the seed that an episode germinated at a step.

    Both lives are replayed from the nearest snapshot with the episode's own actions.

    Args:
        cohort: One that kept snapshots; it is left as it is.
        episode: Index of the episode.
        step: The decision that germinated the seed.

    Raises:
        LifecycleError: The episode germinated nothing at that step, or the cohort kept no snapshots.
        SpecError: The environment does not offer both isolations.
    """
    rider = cohort.riders[episode]
    if not 0 <= step < rider.num_steps or rider.executed_rows[step][_OP] != Op.GERMINATE:
        raise LifecycleError(
            f"episode {episode} germinated nothing at step {step}\n"
            f"  germinated at: {[t for t, row in enumerate(rider.executed_rows) if row[_OP] == Op.GERMINATE]}"
        )
    if set(cohort.spec.isolations) != set(ISOLATIONS):
        raise SpecError(
            f"environment {cohort.spec.name!r} offers {', '.join(cohort.spec.isolations)} alone\n"
            '  expected: isolations = ["isolated", "coadapt"], or there is nothing to compare'
        )
    coadapting, isolated = (_life(cohort, episode, step, kind) for kind in (Isolation.COADAPT, Isolation.ISOLATED))
    ours, theirs = _outcome(coadapting), _outcome(isolated)
    return CoadaptationDelta(
        points=100 * (ours.final_val_accuracy - theirs.final_val_accuracy),
        uncommitted_points=100 * (ours.uncommitted_val_accuracy - theirs.uncommitted_val_accuracy),
        coadapting_accuracies=_accuracies(coadapting, step),
        isolated_accuracies=_accuracies(isolated, step),
        same_actions=_ops(coadapting) == _ops(isolated),
    )


def _life(cohort: Cohort, episode: int, step: int, isolation: Isolation) -> Rider:
    """Replay an episode to its end with the isolation of one germination set."""
    rows = [list(row) for row in cohort.riders[episode].submitted_rows]
    rows[step][_ISOLATION] = ISOLATIONS.index(isolation)
    replay = cohort.branch(episode, step)
    observation = replay.observe()
    while not replay.done:
        now = replay.step_index
        row = np.array(rows[now] if now < len(rows) else WAIT_ROW)
        observation, _ = replay.step(row[None], observation)
    return replay.riders[0]


def _outcome(rider: Rider) -> Outcome:
    if rider.outcome is None:
        raise LifecycleError("the replayed episode has not ended")
    return rider.outcome


def _accuracies(rider: Rider, step: int) -> tuple[float, ...]:
    return tuple(metrics.val_accuracy for metrics in rider.lineage.history[step + 1 :])


def _ops(rider: Rider) -> list[tuple[int, int]]:
    return [(row[0], row[1]) for row in rider.executed_rows]
