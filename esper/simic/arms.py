"""The arms of a comparison, and what their episodes came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.comparison import Group
from esper.leyline.errors import IntegrityError
from esper.leyline.identity import Root
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.rewards import RewardSpec, combine

NEVER_ACT = "never-act"
RANDOM = "random"
HEURISTIC_ARM = "heuristic"
BEST_FIXED = "best-fixed"
BANDIT = "bandit"
BIGGER = "bigger"
WIDER = "wider"
CONTROL_ARMS = (NEVER_ACT, RANDOM, HEURISTIC_ARM, BEST_FIXED, BANDIT, BIGGER, WIDER)
REFERENCES = (NEVER_ACT, HEURISTIC_ARM, BEST_FIXED, BANDIT)
"""The arms to which every arm is compared, where they take part."""

Floats = NDArray[np.float64]

RETURN_TOLERANCE = 1e-6
ROOT_RETURN_TOLERANCE = 1e-4
"""Where an episode does not start as the host, its first potential comes from float32 columns."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "episodes": (
        "episode_id",
        "root",
        "outcome",
        "final_val_accuracy",
        "final_test_accuracy",
        "control_final_val_accuracy",
        "control_final_test_accuracy",
        "control_valid",
        "host_params",
        "final_seed_params",
        "train_flops",
    ),
    "steps": (
        "episode_id",
        "step",
        "is_last",
        "val_accuracy",
        "control_val_accuracy",
        "seed_params",
        "host_params",
        "reward_accuracy_points",
        "reward_growth_log2",
    ),
}
"""All that is read of an episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run an episode."""

    name: str
    group: Group
    episode: PlannedEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one episode came to.

    Attributes:
        test_percent: Test accuracy of the committed network.
        episode_return: Paired gain on validation minus rent, in units of the reward's scale. The rent is on all
            parameters beyond the bare host, those of a wider host included.
        added_params: Parameters beyond the bare host.
        host_params: Parameters of the bare host.
        train_flops: Operations spent on training, the whole episode.
        diverged: Whether it ended as a network at chance.
        rolled_back: Whether the governor rolled it back, and it went on.
    """

    test_percent: float
    episode_return: float
    added_params: float
    host_params: float
    train_flops: float
    diverged: bool
    rolled_back: bool

    @property
    def growth_factor(self) -> float:
        """Parameters over those of the bare host."""
        return 1.0 + self.added_params / self.host_params


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutcomes:
    """Outcomes of all arms on the environment seeds that count, in plan order; `replicates` names those seeds."""

    by_arm: dict[str, list[Outcome]]
    replicates: tuple[int, ...]
    num_control_invalid: int
    num_failed: int

    @property
    def num_env_seeds(self) -> int:
        """Environment seeds that count."""
        return len(self.replicates)

    def values(self, arm: str, field: str) -> Floats:
        """Return one field of an arm's outcomes, float64 [environment seeds]."""
        return np.array([getattr(outcome, field) for outcome in self.by_arm[arm]], dtype=np.float64)

    def on(self, replicates: Sequence[int]) -> CellOutcomes:
        """Return the outcomes on some of the environment seeds, in their order."""
        places = [self.replicates.index(replicate) for replicate in replicates]
        by_arm = {arm: [outcomes[place] for place in places] for arm, outcomes in self.by_arm.items()}
        return replace(self, by_arm=by_arm, replicates=tuple(replicates))


def planned_ids(arms: Sequence[Arm], plan: CohortPlan) -> dict[str, str]:
    """Return the episode id of each arm in a cohort; arms that are the same episode have the same id."""
    return {arm.name: plan.identity(arm.episode).episode_id for arm in arms}


def cell_outcomes(
    arms: Sequence[Arm], reward: RewardSpec, plans: Sequence[CohortPlan], tables: Sequence[Mapping[str, pa.Table]]
) -> CellOutcomes:
    """Return what the arms came to on every environment seed that counts.

    An environment seed is left out, for all arms alike, where its control is not valid or an episode of it failed;
    both are counted.

    Raises:
        IntegrityError: An episode is missing, a return is not the sum of its rewards, or never-act is not the trunk.
    """
    by_arm: dict[str, list[Outcome]] = {arm.name: [] for arm in arms}
    replicates: list[int] = []
    num_control_invalid = num_failed = 0
    for plan, of_cohort in zip(plans, tables, strict=True):
        ids = planned_ids(arms, plan)
        rows = _rows(of_cohort["episodes"], list(ids.values()))
        failed = sum(row["outcome"] == "failed" for row in rows.values())
        invalid = not all(row["control_valid"] for row in rows.values())
        num_failed += failed
        num_control_invalid += invalid
        if failed or invalid:
            continue
        if NEVER_ACT in ids:
            _check_never_act_is_the_trunk(rows[ids[NEVER_ACT]])
        _check_returns(rows, of_cohort["steps"], reward)
        host_params = _bare_host_params(rows)
        replicates.append(plan.replicate)
        for name, episode_id in ids.items():
            by_arm[name].append(_outcome(rows[episode_id], reward, host_params))
    return CellOutcomes(
        by_arm=by_arm,
        replicates=tuple(replicates),
        num_control_invalid=num_control_invalid,
        num_failed=num_failed,
    )


def _rows(episodes: pa.Table, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    found = {row["episode_id"]: row for row in episodes.select(COLUMNS["episodes"]).to_pylist()}
    missing = [episode_id for episode_id in ids if episode_id not in found]
    if missing:
        raise IntegrityError(
            f"episode {missing[0]} was planned but its cohort has no such row in `episodes` ({len(missing)} missing)\n"
            "  expected: one row per planned episode, a failed one included"
        )
    return {episode_id: found[episode_id] for episode_id in ids}


def _bare_host_params(rows: Mapping[str, Mapping[str, Any]]) -> float:
    sizes = {row["host_params"] for row in rows.values() if row["root"] == Root.HOST.value}
    if len(sizes) != 1:
        raise IntegrityError(f"the bare host of one cohort has sizes {sorted(sizes)}\n  expected: exactly one")
    return float(sizes.pop())


def _total_return(reward: RewardSpec, accuracy_points: float, growth_log2: float) -> float:
    return float(combine(reward, np.array([accuracy_points]), np.array([growth_log2])).sum())


def _outcome(row: Mapping[str, Any], reward: RewardSpec, host_params: float) -> Outcome:
    added = row["host_params"] + row["final_seed_params"] - host_params
    points = 100.0 * (row["final_val_accuracy"] - row["control_final_val_accuracy"])
    return Outcome(
        test_percent=100.0 * row["final_test_accuracy"],
        episode_return=_total_return(reward, points, float(np.log2(1.0 + added / host_params))),
        added_params=float(added),
        host_params=host_params,
        train_flops=row["train_flops"],
        diverged=row["outcome"] == "diverged",
        rolled_back=row["outcome"] == "rolled_back",
    )


def _check_never_act_is_the_trunk(row: Mapping[str, Any]) -> None:
    for split in ("val", "test"):
        own, control = row[f"final_{split}_accuracy"], row[f"control_final_{split}_accuracy"]
        if own != control:
            raise IntegrityError(
                f"never-act ends at {split} accuracy {own} and the trunk of its cohort at {control} "
                f"(episode {row['episode_id']})\n  expected: never-act is the trunk"
            )


def _check_returns(rows: Mapping[str, Mapping[str, Any]], steps: pa.Table, reward: RewardSpec) -> None:
    """Raise IntegrityError unless every return is the sum of its rewards, plus what the start was already worth."""
    rewards, starts = _reward_sums(steps), _start_potentials(steps, reward)
    for episode_id, row in rows.items():
        if episode_id not in rewards or episode_id not in starts:
            raise IntegrityError(
                f"episode {episode_id} has no measured start or no decisions\n  expected: one row per observation"
            )
        summed = _total_return(reward, *rewards[episode_id]) + starts[episode_id]
        points = 100.0 * (row["final_val_accuracy"] - row["control_final_val_accuracy"])
        growth = float(np.log2(1.0 + row["final_seed_params"] / row["host_params"]))
        whole = _total_return(reward, points, growth)
        tolerance = RETURN_TOLERANCE if row["root"] == Root.HOST.value else ROOT_RETURN_TOLERANCE
        if not abs(summed - whole) <= tolerance:
            raise IntegrityError(
                f"the rewards of episode {episode_id} add up to {summed}, its outcome is worth {whole}\n"
                f"  expected: equal within {tolerance} (reward {reward.name!r})"
            )


def _reward_sums(steps: pa.Table) -> dict[str, tuple[float, float]]:
    """The sums of the two reward components of each episode's decisions."""
    sums = (
        steps.filter(pc.invert(steps["is_last"]))
        .group_by("episode_id", use_threads=False)
        .aggregate([("reward_accuracy_points", "sum"), ("reward_growth_log2", "sum")])
    )
    columns = ("episode_id", "reward_accuracy_points_sum", "reward_growth_log2_sum")
    ids, points, growth = (sums[name].to_pylist() for name in columns)
    return {episode_id: (a or 0.0, b or 0.0) for episode_id, a, b in zip(ids, points, growth)}


def _start_potentials(steps: pa.Table, reward: RewardSpec) -> dict[str, float]:
    """What each episode is worth before anything happened: nothing, unless it starts as another network."""
    first = steps.filter(pc.equal(steps["step"], 0))
    names = ("episode_id", "val_accuracy", "control_val_accuracy", "seed_params", "host_params")
    starts = {}
    for episode_id, own, control, seed, host in zip(*(first[name].to_pylist() for name in names)):
        if own is None or control is None:
            continue
        growth = float(np.log2(1.0 + seed / host))
        starts[episode_id] = _total_return(reward, 100.0 * (own - control), growth)
    return starts
