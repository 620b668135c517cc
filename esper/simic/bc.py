"""Behaviour cloning on the tree."""

from __future__ import annotations

from esper.simic.batches import Transitions
from esper.simic.cloning import clone
from esper.simic.learning import Fitted, LearnerSpec, OnLog
from esper.simic.replay import Replay, row_weights, unforced


class BcRecipe(LearnerSpec):
    r"""Masked behaviour cloning.

        L = - E_(s, a) [ log pi(op | s) + log pi(slot | op, s) + sum over levers of log pi(lever | op, slot, s) ]

    over decisions that were not forced; what an op does not read has no term. With `weighting = "return"` it is
    return-weighted BC. References: Pomerleau 1991; Hong, Agrawal, Tachet des Combes, Laroche, "Harnessing Mixed Offline
    Reinforcement Learning Datasets via Trajectory Weighting", ICLR 2023.
    """


def fit_bc(train: Transitions, held_out: Transitions, recipe: BcRecipe, *, seed: int, on_log: OnLog) -> Fitted:
    """Return the cloned policy with the lowest held-out loss.

    Args:
        train: Training rows.
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, policy_loss and held_out_policy_loss.
    """
    choices, others = unforced(train), unforced(held_out)
    replay = Replay(choices, key=("bc", seed), weighting=recipe.weighting, temperature=recipe.weighting_temperature)
    weight = row_weights(others, recipe.weighting, recipe.weighting_temperature)
    check = Replay(others, key=("bc", seed), weight_N=weight) if len(others) else None
    return clone(replay, check, recipe, seed=seed, on_log=on_log, normalise_on=train)
