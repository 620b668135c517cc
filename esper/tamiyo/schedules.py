"""Controllers that carry out plans whatever they observe: one fixed schedule, or a pool of them.

One action a step, in this order: the GERMINATE that is due longest, ADVANCE, FOSSILIZE, else WAIT. A plant whose
GERMINATE the state does not allow is passed over for this step; a seed that was pruned is not planted again. After a
refusal the other of ADVANCE and FOSSILIZE comes first, and the slots take turns: a seed that a strict gate turns away
for ever must not keep the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, NUM_OPS, OP_SLICE, Actions, Bools, Op, is_valid, slot_slice
from esper.leyline.controller_specs import FixedSchedule, ScheduleSampler
from esper.leyline.protocols import ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.tree import Floats
from esper.tamiyo.completion import nth_allowed
from esper.tamiyo.mixing import Proposal, draw_mixture, refuse_noise, start_noise
from esper.tamiyo.plans import Plan, plant_row, pool_plan

Ints = NDArray[np.int64]

NEVER = np.iinfo(np.int32).max
"""Birth epoch of the padding of shorter plans."""


def start_plans(plans: Sequence[Plan], episodes: Sequence[EpisodeStart], width: int) -> Carry:
    """Return the memory of one plan per episode, padded to P = `width` plants: memories of one controller concatenate.

    Carry: `rows` int8 [N, P, 8] (the GERMINATE of each plant), `birth` int64 [N, P], `done` bool [N, P] (carried out)
    and `pending` int64 [N] (the plant submitted at the last step, -1 none).
    """
    rows = np.zeros((len(plans), width, ACTION_WIDTH), dtype=np.int8)
    birth = np.full((len(plans), width), NEVER, dtype=np.int64)
    for index, (plan, episode) in enumerate(zip(plans, episodes, strict=True)):
        for place, plant in enumerate(plan):
            rows[index, place] = plant_row(plant, episode.environment)
            birth[index, place] = plant.birth_epoch
    return {
        "rows": rows,
        "birth": birth,
        "done": np.zeros((len(plans), width), dtype=bool),
        "pending": np.full(len(plans), -1, dtype=np.int64),
    }


def confirm_pending(inputs: ActInputs, carry: Carry) -> Bools:
    """Return `done` after what the observation says about the last step, bool [N, P]."""
    columns = inputs.columns
    pending = carry["pending"].astype(np.int64)
    carried = (pending >= 0) & (columns["last_op"] == Op.GERMINATE) & (columns["last_executed"] > 0)
    places = np.arange(carry["done"].shape[1])
    done: Bools = carry["done"].astype(bool) | (carried[:, None] & (places == pending[:, None]))
    return done


def due_plants(inputs: ActInputs, carry: Carry, done_NP: Bools) -> tuple[Actions, Ints]:
    """Return the GERMINATE that is due longest and valid, int8 [N, 8], and its plant, int64 [N], -1 for none (WAIT)."""
    birth, rows = carry["birth"].astype(np.int64), carry["rows"].astype(np.int8)
    num, width = birth.shape
    possible = np.stack([is_valid(rows[:, place], inputs.mask_NT) for place in range(width)], axis=1)
    due = possible & ~done_NP & (birth <= inputs.step_N[:, None])
    place = np.where(due, birth, NEVER).argmin(axis=1)
    plant = np.where(due.any(axis=1), place, -1).astype(np.int64)
    actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
    germinate = plant >= 0
    actions[germinate] = rows[np.arange(num)[germinate], plant[germinate]]
    return actions, plant


def next_actions(inputs: ActInputs, carry: Carry, done_NP: Bools) -> tuple[Actions, Ints]:
    """Return what the plans do now, int8 [N, 8], and the plant that it carries out, int64 [N], -1 for none."""
    mask = inputs.mask_NT
    planted, plant = due_plants(inputs, carry, done_NP)
    actions = np.zeros_like(planted)
    refused = inputs.columns["last_executed"] == 0
    # two steps a turn: the ops alternate too, and each has to come to every slot
    turn = np.where(refused, inputs.step_N // 2, 0)
    for op in (Op.FOSSILIZE, Op.ADVANCE):
        gives_way = refused & (inputs.columns["last_op"] == op) & (actions[:, 0] != Op.WAIT)
        able = mask[:, op] & ~gives_way
        actions[able, 0] = op
        actions[able, 1] = nth_allowed(mask[:, slot_slice(op)], turn)[able]
    germinate = plant >= 0
    actions[germinate] = planted[germinate]
    return actions, plant


def submitted(actions_NA: Actions, carry: Carry, plant_N: Ints) -> Ints:
    """Return the plant of each row, int64 [N]: -1 where the action drawn is not its GERMINATE after all."""
    wanted = carry["rows"].astype(np.int8)[np.arange(len(plant_N)), np.maximum(plant_N, 0)]
    return np.where((plant_N >= 0) & (actions_NA == wanted).all(axis=1), plant_N, -1)


def certain(actions_NA: Actions, mask_NT: Bools) -> Proposal:
    """Return the proposal of a rule that has one action: score 1 for its op, 0 for the other valid ones."""
    index = np.arange(len(actions_NA))
    scores: Floats = np.where(mask_NT[:, OP_SLICE], 0.0, -np.inf)
    scores[index, actions_NA[:, 0]] = 1.0
    completions = np.zeros((len(actions_NA), NUM_OPS, ACTION_WIDTH), dtype=np.int8)
    completions[index, actions_NA[:, 0]] = actions_NA
    return Proposal(scores_NO=scores, completions_NOA=completions)


class FixedScheduleController:
    """Carries out one schedule, mixed with u by each episode's epsilon (exploring never marks a plant as done)."""

    def __init__(self, spec: FixedSchedule) -> None:
        self.name: str = spec.name
        self.spec = spec

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes.

        Raises:
            SpecError: A plant in a slot that the host lacks or may not use, of a blueprint it lacks, or a temperature.
        """
        refuse_noise(self.name, episodes, epsilon=False)
        noise = start_noise(episodes)
        return {**noise, **start_plans([self.spec.plants] * len(episodes), episodes, max(1, len(self.spec.plants)))}

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one action per row with its exact probability under the mixture."""
        done = confirm_pending(inputs, carry)
        actions, plant = next_actions(inputs, carry, done)
        epsilon = carry["epsilon"].astype(np.float64)
        temperature = carry["temperature"].astype(np.float64)
        mixture = draw_mixture(certain(actions, inputs.mask_NT), inputs, epsilon, temperature)
        pending = submitted(mixture.actions_NA, carry, plant)
        return Decision(
            actions_NA=mixture.actions_NA,
            logp_N=mixture.logp_N,
            op_probs=mixture.op_probs_NO,
            carry={**carry, "done": done, "pending": pending},
        )


class ScheduleSamplerController:
    """Carries out plan r of the pool in repetition r. The choice of a plan has no propensity: logp and op_probs NaN."""

    def __init__(self, spec: ScheduleSampler) -> None:
        self.name: str = spec.name
        self.spec = spec

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes, with `plan` int64 [N].

        Raises:
            SpecError: A repetition beyond the pool, fewer slots than the pool plans for, an epsilon or a temperature.
        """
        refuse_noise(self.name, episodes, epsilon=True)
        plans = [pool_plan(self.spec, episode.repetition, episode.environment) for episode in episodes]
        index = np.array([episode.repetition for episode in episodes], dtype=np.int64)
        return {**start_plans(plans, episodes, self.spec.num_slots), "plan": index}

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return the next action of each row's plan."""
        done = confirm_pending(inputs, carry)
        actions, plant = next_actions(inputs, carry, done)
        num = len(actions)
        return Decision(
            actions_NA=actions,
            logp_N=np.full(num, np.nan),
            op_probs=np.full((num, NUM_OPS), np.nan),
            carry={**carry, "done": done, "pending": plant},
            plan_N=carry["plan"].astype(np.int64),
        )
