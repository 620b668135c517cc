"""A one-step problem on the tree with a known answer: germinate blueprint BEST in the slot that the context names."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from factories import blueprint_params
from synthetic_host import Trajectory

from esper.leyline.actions import ACTION_WIDTH, TREE_WIDTH, Op, check_mask, lever_slice, pack_mask, slot_slice
from esper.leyline.keys import hex_digest, numpy_generator
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.matrix import CohortPlan
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import ActInputs, EpisodeStart
from esper.leyline.rewards import RewardSpec
from esper.leyline.schema import ACTION_FIELDS, STEPS
from esper.leyline.views import get_view
from esper.simic.batches import Transitions
from esper.tamiyo.registry import build_controller

BEST, USUAL = 2, 0
REWARD = RewardSpec(name="bandit", rent_points=1.0, scale_points=1.0)


def bandit_mask(num: int) -> np.ndarray:
    """WAIT, or GERMINATE in slot 0 or 1 with one of four blueprints and default levers."""
    mask = np.zeros((num, TREE_WIDTH), dtype=bool)
    mask[:, [Op.WAIT, Op.GERMINATE]] = True
    for slot in (0, 1):
        mask[:, slot_slice(Op.GERMINATE).start + slot] = True
        mask[:, lever_slice(slot, 0).start : lever_slice(slot, 0).start + 4] = True
        for lever in range(1, 6):
            mask[:, lever_slice(slot, lever).start] = True
    check_mask(mask)
    return mask


def bandit_reward(actions: np.ndarray, context: np.ndarray) -> np.ndarray:
    """1 for the best germination, -0.5 for another, 0 for WAIT."""
    germinates = actions[:, 0] == Op.GERMINATE
    best = (actions[:, 2] == BEST) & (actions[:, 1] == context)
    return np.where(germinates, np.where(best, 1.0, -0.5), 0.0)


def live_reward(actions: np.ndarray) -> np.ndarray:
    """1 for a germination of BEST, 0.25 for another, 0 for WAIT."""
    return (actions[:, 0] == Op.GERMINATE) * np.where(actions[:, 2] == BEST, 1.0, 0.25)


def bandit_transitions(num: int = 2000, seed: int = 0) -> tuple[Transitions, np.ndarray]:
    """Rows of a behaviour that mostly germinates USUAL in slot 0, and the context of each."""
    rng = numpy_generator("bandit", seed)
    width = get_view("v1").width
    context = rng.integers(2, size=num)
    obs = np.zeros((2 * num, width), dtype=np.float32)
    obs[:num, 3], obs[:num, 4] = context, 0.1 * rng.normal(size=num)
    actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
    usual = rng.random(num) < 0.6
    germinates = usual | (rng.random(num) < 0.7)
    actions[germinates, 0] = Op.GERMINATE
    actions[germinates, 1] = np.where(usual, 0, rng.integers(2, size=num))[germinates]
    actions[germinates, 2] = np.where(usual, USUAL, rng.integers(4, size=num))[germinates]
    reward = bandit_reward(actions, context)
    index = np.arange(num)
    return Transitions(
        view="v1",
        environments=("bandit",),
        obs_MV=obs,
        mask_MT=bandit_mask(2 * num),
        state_N=index,
        next_N=index + num,
        action_NA=actions,
        reward_N=reward,
        discount_N=np.zeros(num),
        forced_N=np.zeros(num, dtype=bool),
        env_seed_N=index % 10,
        environment_N=np.zeros(num, dtype=np.int64),
        episode_N=index,
        return_N=reward,
        logp_N=np.full(num, np.nan),
    ), context


def live_bandit(plans: Sequence[CohortPlan]) -> list[dict[str, pa.Table]]:
    """A runner: every episode is one decision of the plan's controller on a bare host; WAIT is worth 0."""
    return [_cohort(plan) for plan in plans]


def _cohort(plan: CohortPlan) -> dict[str, pa.Table]:
    observed = Trajectory(plan.environment, plan.env_seed, 0).observe()
    num = len(plan.episodes)
    columns = {name: np.full(num, observed[name], np.float32) for name in FEATURE_COLUMNS}
    mask = build_mask(columns, LeverRules.of(plan.environment, blueprint_params(plan.environment)))
    controller = build_controller(plan.episodes[0].controller)
    carry = controller.start(
        [
            EpisodeStart(
                environment=plan.environment, replicate=plan.replicate, repetition=p.repetition, epsilon=p.epsilon,
                temperature=p.temperature,
            )
            for p in plan.episodes
        ]
    )  # fmt: skip
    uniforms = numpy_generator("live", plan.env_seed, plan.episodes[0].controller.spec_id).random((num, 9))
    steps = np.zeros(num, dtype=np.int64)
    decision = controller.act(ActInputs(columns=columns, step_N=steps, mask_NT=mask, uniforms=uniforms), carry)
    reward = live_reward(decision.actions_NA)
    ids = [hex_digest([plan.env_seed, plan.episodes[0].controller.spec_id, i], 24) for i in range(num)]
    rows = []
    for index in range(num):
        shared = {name: None if np.isnan(v) else v for name, v in observed.items()}
        shared |= {"episode_id": ids[index], "environment": plan.environment.name, "env_seed": plan.env_seed}
        shared |= {"role": "online", "replayed": False, "truncated": False}
        shared |= {"tree_mask": pack_mask(mask[:1])[0].tobytes()}
        action = decision.actions_NA[index]
        rows.append(
            shared
            | {"step": 0, "is_last": False, "terminated": True, "op": Op(int(action[0])).name}
            | {name: int(value) for name, value in zip(ACTION_FIELDS, action[1:])}
            | {"behaviour_logp": float(decision.logp_N[index])}
            | {"reward_accuracy_points": float(reward[index]), "reward_growth_log2": 0.0}
        )
        rows.append(shared | {"step": 1, "is_last": True, "terminated": False})
    columns_out = {}
    for item in STEPS:
        values = [row.get(item.name) for row in rows]
        if pa.types.is_integer(item.type):
            values = [None if value is None else int(value) for value in values]
        columns_out[item.name] = pa.array(values, item.type)
    episodes = {"episode_id": ids, "control_valid": [True] * num, "outcome": ["completed"] * num}
    return {"steps": pa.table(columns_out), "episodes": pa.table(episodes)}
