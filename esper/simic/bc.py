"""Behaviour cloning on the tree, plain and return-weighted."""

from __future__ import annotations

from typing import Literal

from esper.simic.batches import Transitions
from esper.simic.cloning import clone
from esper.simic.learning import Fitted, LearnerSpec, OnLog
from esper.simic.replay import Replay, row_weights, unforced
from esper.simic.resume import Progress


class BcRecipe(LearnerSpec):
    r"""Masked behaviour cloning.

        L = - E_(s, a) [ log pi(op | s) + log pi(slot | op, s) + sum over levers of log pi(lever | op, slot, s) ]

    over decisions that were not forced; what an op does not read has no term. The held-out value of L chooses the step
    and is what `patience` watches. Reference: Pomerleau 1991.
    """


class RwbcRecipe(BcRecipe):
    r"""Return-weighted behaviour cloning: BC on trajectories drawn by how well they ended.

        L = - E_(tau ~ p) E_((s, a) in tau) [ log pi(a | s) ]                  (log pi as in BC, unforced decisions)
        p(tau) prop. to exp( (G(tau) - min G) / (max G - min G) / weighting_temperature )

    within each environment, so that no environment is weighed down by its difficulty. It imitates the better part of
    mixed data at the cost of BC: the baseline that offline RL has to beat. The held-out loss has the same weights; it
    chooses the step and is what `patience` watches. Reference: Hong, Agrawal, Tachet des Combes, Laroche, "Harnessing
    Mixed Offline Reinforcement Learning Datasets via Trajectory Weighting", ICLR 2023.

    Attributes:
        weighting: Always `return`; without it this is BC.
    """

    weighting: Literal["return"] = "return"


def fit_bc(
    train: Transitions,
    held_out: Transitions,
    recipe: BcRecipe,
    *,
    seed: int,
    on_log: OnLog,
    progress: Progress | None = None,
) -> Fitted:
    """Return the cloned policy with the lowest held-out loss.

    Args:
        train: Training rows.
        held_out: Rows of held-out environment seeds; may be empty.
        recipe: What to do; a `RwbcRecipe` weighs by return.
        seed: Keys the initial weights and the minibatches.
        on_log: Receives step, policy_loss and held_out_policy_loss.
        progress: Where a killed run left off; None stores nothing.
    """
    choices, others = unforced(train), unforced(held_out)
    episodes = recipe.network.trunk == "gru"
    replay = Replay(
        choices,
        key=("bc", seed),
        weighting=recipe.weighting,
        temperature=recipe.weighting_temperature,
        whole_episodes=episodes,
    )
    weight = row_weights(others, recipe.weighting, recipe.weighting_temperature)
    check = Replay(others, key=("bc", seed), weight_N=weight, whole_episodes=episodes) if len(others) else None
    return clone(replay, check, recipe, seed=seed, on_log=on_log, normalise_on=train, progress=progress)
