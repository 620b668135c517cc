"""A task for memory: the slot that pays is shown at the first of four decisions and can be chosen at the last alone."""

from __future__ import annotations

import numpy as np
from tree_bandit import bandit_mask

from esper.leyline.actions import ACTION_WIDTH, TREE_WIDTH, Op
from esper.leyline.keys import numpy_generator
from esper.leyline.views import get_view
from esper.simic.batches import Transitions

STEPS = 4


def memory_transitions(num: int = 300, right_share: float = 0.6) -> tuple[Transitions, np.ndarray]:
    """Episodes of a behaviour that germinates in the right slot with a probability, and the cue of each episode."""
    rng = numpy_generator("memory", 0)
    cue = rng.integers(2, size=num)
    states = np.arange(num * (STEPS + 1)).reshape(num, STEPS + 1)
    obs = np.zeros((num, STEPS + 1, get_view("v1").width), dtype=np.float32)
    obs[:, :, 4] = rng.normal(size=(num, STEPS + 1))
    obs[:, :, 0] = np.arange(STEPS + 1) / STEPS
    obs[:, 0, 3] = 2.0 * cue - 1.0
    mask = np.zeros((num, STEPS + 1, TREE_WIDTH), dtype=bool)
    mask[:, :, Op.WAIT] = True
    mask[:, STEPS - 1] = bandit_mask(num)
    actions = np.zeros((num, STEPS, ACTION_WIDTH), dtype=np.int8)
    right = rng.random(num) < right_share
    actions[:, -1, 0] = Op.GERMINATE
    actions[:, -1, 1] = np.where(right, cue, 1 - cue)
    reward = np.zeros((num, STEPS))
    reward[:, -1] = np.where(right, 1.0, -1.0)
    return Transitions(
        view="v1",
        environments=("memory",),
        obs_MV=obs.reshape(-1, obs.shape[2]),
        mask_MT=mask.reshape(-1, TREE_WIDTH),
        state_N=states[:, :-1].flatten(),
        next_N=states[:, 1:].flatten(),
        action_NA=actions.reshape(-1, ACTION_WIDTH),
        reward_N=reward.flatten(),
        discount_N=np.tile(np.arange(STEPS) < STEPS - 1, num).astype(np.float64),
        forced_N=np.tile(np.arange(STEPS) < STEPS - 1, num),
        env_seed_N=np.repeat(np.arange(num) % 10, STEPS),
        environment_N=np.zeros(num * STEPS, dtype=np.int64),
        episode_N=np.repeat(np.arange(num), STEPS),
        return_N=np.repeat(reward.sum(axis=1), STEPS),
        logp_N=np.full(num * STEPS, np.nan),
        episode_M=np.repeat(np.arange(num), STEPS + 1),
    ), cue
