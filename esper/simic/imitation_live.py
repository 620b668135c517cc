"""The imitation policy live beside the heuristic: the same environment seeds, and every decision asked of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.actions import Actions
from esper.leyline.controller_specs import Heuristic, LearnedPolicy
from esper.leyline.errors import ControlError, IntegrityError, SpecError
from esper.leyline.identity import SELECTION_START, Role
from esper.leyline.imitation import Agreement, Confusion, LiveComparison, classes_of
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import ActInputs, Controller, EpisodeStart
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.tree import NUM_UNIFORMS
from esper.simic.arms import Arm, cell_outcomes
from esper.simic.batches import from_steps
from esper.simic.statistics import mean_interval, paired_interval
from esper.tamiyo.registry import build_controller

MIN_ENV_SEEDS = 2
"""Fewer have no interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The two arms on one environment, and the cohorts in which they meet."""

    environment: EnvironmentSpec
    reward: RewardSpec
    heuristic: Arm
    imitation: Arm
    plans: tuple[CohortPlan, ...]


def plan_beside(
    environment: EnvironmentSpec, reward: RewardSpec, *, rules: Heuristic, policy: LearnedPolicy, num_env_seeds: int
) -> Beside:
    """Return one cohort per selection environment seed with one episode of each arm.

    Args:
        environment: Where they meet.
        reward: Its reward.
        rules: The heuristic.
        policy: The imitation policy; acts by its best class.
        num_env_seeds: How many selection seeds, at least two.

    Raises:
        SpecError: Fewer than two seeds, or both arms have one name.
    """
    if num_env_seeds < MIN_ENV_SEEDS:
        raise SpecError(f"{num_env_seeds} live environment seeds\n  expected: at least {MIN_ENV_SEEDS}, or 0 for none")
    if rules.name == policy.name:
        raise SpecError(f"a policy cannot be called {policy.name!r}\n  that is the heuristic beside it; choose another")
    greedy = policy.model_copy(update={"sampled": False})
    arms = (
        Arm(name=rules.name, group="rule", episode=PlannedEpisode(controller=rules, role=Role.SELECTION)),
        Arm(name=policy.name, group="learned", episode=PlannedEpisode(controller=greedy, role=Role.SELECTION)),
    )
    plans = tuple(
        CohortPlan(
            environment=environment, reward=reward, replicate=replicate, episodes=tuple(arm.episode for arm in arms)
        )
        for replicate in range(SELECTION_START, SELECTION_START + num_env_seeds)
    )
    return Beside(environment=environment, reward=reward, heuristic=arms[0], imitation=arms[1], plans=plans)


def compare_beside(beside: Beside, tables: Sequence[Mapping[str, pa.Table]]) -> LiveComparison:
    """Return what the two arms came to, and where they disagree.

    Environment seeds without a valid control or with a failed episode are left out of everything, and counted.

    Args:
        beside: What was planned.
        tables: What its cohorts recorded, in plan order.

    Raises:
        ControlError: Fewer than two environment seeds remain.
        IntegrityError: The tables contradict themselves or do not fit the plans.
    """
    if len(tables) != len(beside.plans):
        raise IntegrityError(f"{len(beside.plans)} cohorts were planned and {len(tables)} came back")
    kept = [(plan, part) for plan, part in zip(beside.plans, tables) if _is_usable(part["episodes"])]
    if len(kept) < MIN_ENV_SEEDS:
        raise ControlError(
            f"{beside.environment.name}: {len(kept)} of {len(tables)} environment seeds can be compared\n"
            "  expected: at least two seeds whose trunk trains to the end and whose episodes did not fail"
        )
    plans, parts = [plan for plan, _ in kept], [part for _, part in kept]
    arms = (beside.heuristic, beside.imitation)
    outcomes = cell_outcomes(arms, beside.reward, plans, parts)
    heuristic, imitation = (build_controller(arm.episode.controller) for arm in arms)
    test = {arm.name: outcomes.values(arm.name, "test_percent") for arm in arms}
    returns = {arm.name: outcomes.values(arm.name, "episode_return") for arm in arms}
    rule, learned = beside.heuristic.name, beside.imitation.name
    key = ("imitation", beside.environment.name, rule)
    return LiveComparison(
        environment=beside.environment.name,
        num_env_seeds=len(kept),
        num_left_out=len(tables) - len(kept),
        heuristic_test_percent=mean_interval(test[rule], key=(*key, "test", "heuristic")),
        imitation_test_percent=mean_interval(test[learned], key=(*key, "test", "imitation")),
        test_difference=paired_interval(test[learned], test[rule], key=(*key, "test", "difference")),
        heuristic_return=mean_interval(returns[rule], key=(*key, "return", "heuristic")),
        imitation_return=mean_interval(returns[learned], key=(*key, "return", "imitation")),
        return_difference=paired_interval(returns[learned], returns[rule], key=(*key, "return", "difference")),
        on_heuristic=agreement(beside, beside.heuristic, plans, parts, heuristic, imitation),
        on_imitation=agreement(beside, beside.imitation, plans, parts, heuristic, imitation),
    )


def _is_usable(episodes: pa.Table) -> bool:
    return bool(
        pc.all(episodes["control_valid"]).as_py() and pc.all(pc.not_equal(episodes["outcome"], "failed")).as_py()
    )


def agreement(
    beside: Beside,
    along: Arm,
    plans: Sequence[CohortPlan],
    tables: Sequence[Mapping[str, pa.Table]],
    heuristic: Controller,
    imitation: Controller,
) -> Agreement:
    """Return how two controllers decide along the episodes of one arm.

    Both are asked again at every decision: an observation is stored as a controller saw it, so the arm's own
    controller decides as it did then.
    """
    ids = {plan.identity(along.episode).episode_id: plan.replicate for plan in plans}
    steps = pa.concat_tables([part["steps"] for part in tables])
    steps = steps.filter(pc.is_in(steps["episode_id"], pa.array(list(ids))))
    steps = steps.sort_by([("env_seed", "ascending"), ("episode_id", "ascending"), ("step", "ascending")])
    found = from_steps(steps, "v1", {beside.environment.name: beside.reward})
    order = pc.unique(steps["episode_id"]).to_pylist()
    starts = [_start(beside.environment, ids[name]) for name in order]
    rows = found.state_N
    columns = {name: _column(steps, name)[rows] for name in FEATURE_COLUMNS}
    asked = Asked(columns, _column(steps, "step")[rows].astype(np.int64), found.mask_MT[rows], found.episode_N)
    by_rule, by_policy = asked.decide(heuristic, starts), asked.decide(imitation, starts)
    choice = ~found.forced_N
    right, predicted = classes_of(by_rule), classes_of(by_policy)
    other = choice & (right == predicted) & (by_rule != by_policy).any(axis=1)
    return Agreement(
        choices=Confusion.of(right[choice], predicted[choice]),
        num_forced=int(found.forced_N.sum()),
        num_other_action=int(other.sum()),
    )


def _start(environment: EnvironmentSpec, replicate: int) -> EpisodeStart:
    return EpisodeStart(environment=environment, replicate=replicate, repetition=0, epsilon=0.0, temperature=None)


def _column(steps: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as controllers see it live, float64 with NaN where unmeasured."""
    values = pc.cast(steps[name].combine_chunks(), pa.float64()).to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Asked:
    """Decisions of stored episodes, in the order of (episode, step).

    Attributes:
        columns: Feature columns, float64 [N] each.
        step_N: Decisions taken before.
        mask_NT: Action masks.
        episode_N: Index of the episode.
    """

    columns: Mapping[str, NDArray[np.float64]]
    step_N: NDArray[np.int64]
    mask_NT: NDArray[np.bool_]
    episode_N: NDArray[np.int64]

    def decide(self, controller: Controller, starts: Sequence[EpisodeStart]) -> Actions:
        """Return what a controller without noise decides at each of them, int8 [N, A].

        Args:
            controller: Whom to ask; it remembers an episode from step to step as it would live.
            starts: How each episode began.
        """
        carry = {key: np.array(values) for key, values in controller.start(starts).items()}
        actions: list[tuple[NDArray[np.intp], Actions]] = []
        for step in np.unique(self.step_N):
            rows = np.flatnonzero(self.step_N == step)
            of = self.episode_N[rows]
            inputs = ActInputs(
                columns={name: values[rows] for name, values in self.columns.items()},
                step_N=self.step_N[rows],
                mask_NT=self.mask_NT[rows],
                uniforms=np.zeros((len(rows), NUM_UNIFORMS)),
            )
            decision = controller.act(inputs, {key: values[of] for key, values in carry.items()})
            for key, values in decision.carry.items():
                carry[key][of] = values
            actions.append((rows, decision.actions_NA))
        out: Actions = np.zeros((len(self.step_N), actions[0][1].shape[1]), dtype=np.int8)
        for rows, decided in actions:
            out[rows] = decided
        return out
