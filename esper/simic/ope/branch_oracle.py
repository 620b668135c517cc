"""The branch oracle: what several actions were worth from the same state, measured by carrying each of them out.

A branch replays an episode up to a state, forces an action there and lets one controller go on. Hosts, data order and
noise are keyed, so the difference of two branches' returns is the difference that the action made: a measured
advantage, against which any critic can be held. Stored branches are used where the data have them; `plan_branches`
plans new ones, with the policy itself going on (role `online`: learners do not see them unless told).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline import tree
from esper.leyline.actions import Actions
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.identity import Role
from esper.leyline.keys import KeyPart, canonical_json, numpy_generator
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.leyline.ope import BranchCorrelation
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec
from esper.simic.batches import Floats, Ints
from esper.simic.ope.calibration import CONTROLLER
from esper.simic.ope.live import episode_returns
from esper.simic.ope.logged import Logged
from esper.simic.ope.ranking import kendall, spearman
from esper.tamiyo.mixing import uniform_log_probs

NUM_RESAMPLES = 500
TIE = 1e-9
"""Returns that differ by less than this are equal."""


class MeasuredBranch(Spec):
    """One branch that was run: who went on, where it left which episode by which action, and what it came to."""

    then: str
    parent: str
    step: int
    action: tuple[int, ...]
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Actions tried from the same states, B of them.

    Attributes:
        then: Who went on.
        state_B: The logged row of the state.
        action_BA: The action.
        measured_B: The return of the branch.
        group_B: Which state it is, from 0; actions of one group compare.
        env_seed_B: What is resampled.
    """

    then: str
    state_B: Ints
    action_BA: Actions
    measured_B: Floats
    group_B: Ints
    env_seed_B: Ints


_Row = tuple[int, tuple[int, ...], float]


def stored_branches(logged: Logged) -> list[Tried]:
    """Return the branches of the data by who went on; the parent counts where the same controller made it alone."""
    returns = logged.returns
    index = {episode["episode_id"]: place for place, episode in enumerate(logged.episodes)}
    action_of = dict(zip(logged.transitions.state_N.tolist(), logged.transitions.action_NA))
    by_then: dict[str, dict[tuple[str, int, str], list[_Row]]] = {}
    for place, episode in enumerate(logged.episodes):
        parent, step = episode["branch_parent"], episode["branch_step"]
        if parent is None:
            continue
        row = int(logged.first_E[place]) + step
        who = canonical_json([episode["controller_id"], episode["epsilon"]])
        groups = by_then.setdefault(CONTROLLER.validate_json(episode["controller_spec"]).name, {})
        tried = groups.setdefault((parent, step, who), [])
        tried.append((row, tuple(action_of[row].tolist()), float(returns[place])))
        origin = index.get(parent)
        if len(tried) == 1 and origin is not None:
            other = logged.episodes[origin]
            own = int(logged.first_E[origin]) + step
            same = canonical_json([other["controller_id"], other["epsilon"]]) == who and other["epsilon"] == 0.0
            if same and other["branch_parent"] is None:
                tried.append((own, tuple(action_of[own].tolist()), float(returns[origin])))
    found = [_tried(then, by_then[then].values(), logged) for then in sorted(by_then)]
    return [item for item in found if item is not None]


def measured_branches(branches: Sequence[MeasuredBranch], logged: Logged) -> list[Tried]:
    """Return branches that were run as tried actions, by who went on; without states that have only one action."""
    index = {episode["episode_id"]: place for place, episode in enumerate(logged.episodes)}
    by_then: dict[str, dict[tuple[str, int], list[_Row]]] = {}
    for branch in branches:
        row = int(logged.first_E[index[branch.parent]]) + branch.step
        groups = by_then.setdefault(branch.then, {})
        groups.setdefault((branch.parent, branch.step), []).append((row, branch.action, branch.measured))
    found = [_tried(then, by_then[then].values(), logged) for then in sorted(by_then)]
    return [item for item in found if item is not None]


def _tried(then: str, groups: Iterable[Sequence[_Row]], logged: Logged) -> Tried | None:
    seed_of_row = np.repeat([int(episode["env_seed"]) for episode in logged.episodes], logged.length_E)
    rows: list[tuple[int, tuple[int, ...], float, int]] = []
    number = 0
    for group in groups:
        distinct = {action: (row, action, value) for row, action, value in group}
        if len(distinct) > 1:
            rows += [(*item, number) for item in distinct.values()]
            number += 1
    if not rows:
        return None
    state = np.array([row[0] for row in rows])
    return Tried(
        then=then,
        state_B=state,
        action_BA=np.array([row[1] for row in rows], dtype=np.int8),
        measured_B=np.array([row[2] for row in rows]),
        group_B=np.array([row[3] for row in rows]),
        env_seed_B=seed_of_row[state],
    )


def correlate(policy: str, critic: str, tried: Tried, value_B: Floats, *, key: Sequence[KeyPart]) -> BranchCorrelation:
    """Return how well a critic's values rank tried actions, pooled over states after centring within each.

    Args:
        policy: Whose critic it is.
        critic: What the values are.
        tried: The actions and what they came to.
        value_B: The critic's value of each.
        key: Keys the resamples of the interval.
    """
    guess, true = centred(value_B, tried.group_B), centred(tried.measured_B, tried.group_B)
    low, high = _interval(guess, true, tried.env_seed_B, key)
    hits, chances = [], []
    for group in range(int(tried.group_B.max()) + 1):
        of = tried.group_B == group
        best = true[of] >= true[of].max() - TIE
        hits.append(bool(best[int(guess[of].argmax())]))
        chances.append(float(best.mean()))
    return BranchCorrelation(
        policy=policy,
        critic=critic,
        then=tried.then,
        num_states=len(hits),
        num_actions=len(guess),
        num_env_seeds=len(np.unique(tried.env_seed_B)),
        spearman=spearman(guess, true),
        spearman_low=low,
        spearman_high=high,
        kendall=kendall(guess, true),
        top_share=float(np.mean(hits)),
        chance_share=float(np.mean(chances)),
    )


def centred(value_B: Floats, group_B: Ints) -> Floats:
    """Return values minus their group's mean: advantages over what was tried."""
    return value_B - (np.bincount(group_B, weights=value_B) / np.bincount(group_B))[group_B]


def _interval(
    guess: Floats, true: Floats, env_seed_B: Ints, key: Sequence[KeyPart]
) -> tuple[float, float] | tuple[None, None]:
    seeds, place = np.unique(env_seed_B, return_inverse=True)
    if len(seeds) < 2:
        return None, None
    rows_of = [np.flatnonzero(place == seed) for seed in range(len(seeds))]
    generator = numpy_generator("branch oracle", *key)
    found = []
    for _ in range(NUM_RESAMPLES):
        rows = np.concatenate([rows_of[seed] for seed in generator.integers(len(seeds), size=len(seeds))])
        value = spearman(guess[rows], true[rows])
        if value is not None:
            found.append(value)
    if not found:
        return None, None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class PlannedStates:
    """Cohorts of branches, and for each branch id where it leaves which episode by which action."""

    plans: tuple[CohortPlan, ...]
    leaves: Mapping[str, tuple[str, int, tuple[int, ...]]]


def plan_branches(
    logged: Logged,
    policy: LearnedPolicy,
    greedy_MA: Actions,
    rewards: Mapping[str, RewardSpec],
    *,
    num_states: int,
    num_actions: int,
    key: Sequence[KeyPart],
) -> PlannedStates:
    """Plan branches from logged states, the policy going on after each.

    States are different decisions with a choice, taken from the env_seeds in turn. In each the policy's own action and
    WAIT are tried, the rest is drawn from u without repetition.

    Args:
        logged: The data; episodes from another root and branches are no parents.
        policy: Who goes on, by its most probable choices.
        greedy_MA: Its action in every logged row.
        rewards: The reward of each environment.
        num_states: States at most.
        num_actions: Different actions tried in each, at least 2.
        key: Keys what is drawn.

    Raises:
        SpecError: The data are of another version of the engine: their states cannot be reached again.
    """
    generator = numpy_generator("branch states", *key)
    then = PlannedEpisode(controller=policy.model_copy(update={"sampled": False}), role=Role.ONLINE)
    by_cohort: dict[tuple[str, int], list[PlannedBranch]] = {}
    for row in _states(logged, num_states, generator):
        place = int(np.searchsorted(logged.first_E, row, side="right")) - 1
        episode = logged.episodes[place]
        parent = PlannedEpisode(
            controller=CONTROLLER.validate_json(episode["controller_spec"]),
            epsilon=episode["epsilon"],
            temperature=episode["temperature"],
            repetition=episode["repetition"],
        )
        branches = by_cohort.setdefault((episode["environment_spec"], episode["replicate"]), [])
        for action in _actions(logged.transitions.mask_MT[row], greedy_MA[row], num_actions, generator):
            step = row - int(logged.first_E[place])
            branches.append(PlannedBranch(parent=parent, step=step, forced=(action,), then=then))
    stored = {episode["episode_id"] for episode in logged.episodes}
    plans, leaves = [], {}
    for (text, replicate), branches in by_cohort.items():
        place = next(i for i, episode in enumerate(logged.episodes) if episode["environment_spec"] == text)
        environment = logged.environment(place)
        plan = CohortPlan(
            environment=environment,
            reward=rewards[environment.name],
            replicate=replicate,
            episodes=(),
            branches=tuple(branches),
        )
        plans.append(plan)
        for name, branch in zip(plan.branch_ids(), branches, strict=True):
            parent_id = plan.identity(branch.parent).episode_id
            if parent_id not in stored:
                raise SpecError(
                    f"a parent of {environment.name}/{replicate} would be run as episode {parent_id}, which the data "
                    "do not have\n  they were made by another version of the engine or of the environment; "
                    "generate them again, or leave out the branch states"
                )
            leaves[name] = (parent_id, branch.step, branch.forced[0])
    return PlannedStates(tuple(plans), leaves)


def _states(logged: Logged, num_states: int, generator: np.random.Generator) -> list[int]:
    """Different unforced decisions, one env_seed after another."""
    transitions = logged.transitions
    whole = np.array([e["root"] == "host" for e in logged.episodes]) & ~logged.branched
    rows = transitions.state_N[whole[transitions.episode_N] & ~transitions.forced_N]
    rows = rows[generator.permutation(len(rows))]
    seed_of_row = np.repeat([int(episode["env_seed"]) for episode in logged.episodes], logged.length_E)
    queues: dict[int, list[int]] = {}
    seen: set[tuple[int, bytes]] = set()
    for row in rows.tolist():
        state = (int(seed_of_row[row]), logged.features_MF[row].tobytes())
        if state not in seen:
            seen.add(state)
            queues.setdefault(state[0], []).append(row)
    chosen: list[int] = []
    while queues and len(chosen) < num_states:
        for seed in sorted(queues):
            if len(chosen) < num_states:
                chosen.append(queues[seed].pop())
            if not queues[seed]:
                del queues[seed]
    return chosen


def _actions(
    mask_T: NDArray[np.bool_], greedy_A: Actions, num_actions: int, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    wait = (0,) * len(greedy_A)
    found = dict.fromkeys([tuple(greedy_A.tolist()), wait])
    draws = 20 * num_actions
    mask_NT = np.tile(mask_T, (draws, 1))
    uniforms = generator.random((draws, len(greedy_A)))
    for action in tree.sample(uniform_log_probs(mask_NT), mask_NT, uniforms).tolist():
        if len(found) >= num_actions:
            break
        found.setdefault(tuple(action))
    return list(found)[:num_actions]


def read_branches(
    planned: PlannedStates, tables: Sequence[Mapping[str, pa.Table]], rewards: Mapping[str, RewardSpec], then: str
) -> list[MeasuredBranch]:
    """Return what the branches came to, `then` having gone on; those that failed or lack a valid control are not."""
    found = []
    for of_cohort in tables:
        episodes = of_cohort["episodes"]
        good = episodes.filter(pc.and_(episodes["control_valid"], pc.not_equal(episodes["outcome"], "failed")))
        names = (good["episode_id"].to_pylist(), good["environment"].to_pylist())
        returns = episode_returns(of_cohort["steps"], {name: rewards[place] for name, place in zip(*names)})
        for name, total in returns.items():
            if name in planned.leaves:
                parent, step, action = planned.leaves[name]
                found.append(MeasuredBranch(then=then, parent=parent, step=step, action=action, measured=total))
    return found
