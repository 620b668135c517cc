"""Tiny environments for engine tests: seconds become tenths."""

from __future__ import annotations

from collections.abc import Sequence

from esper.leyline.library import load
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec

THIRTEEN = [
    "baseline",
    "fast-lr",
    "slow-lr",
    "wide",
    "deep",
    "adam",
    "small-batch",
    "large-batch",
    "resnet18",
    "resnet34",
    "resnet34-adam",
    "resnet34-slow",
    "resnet34-small-batch",
]
"""The environments of the published matrix."""

REWARD = load("rewards", "digits-gap", RewardSpec)


def tiny_environment(**changes: object) -> EnvironmentSpec:
    """digits-gap with a few batches and epochs."""
    spec = load("environments", "digits-gap", EnvironmentSpec)
    task = spec.task.model_copy(update={"sources": (120, 40, 40), "copies": (1, 1, 1)})
    small = {"task": task, "batch_size": 32, "batches_per_epoch": 3, "horizon": 6}
    return EnvironmentSpec.parse({**spec.model_dump(), **small, **changes})


def plan_of(
    episodes: Sequence[PlannedEpisode], environment: EnvironmentSpec | None = None, replicate: int = 0
) -> CohortPlan:
    """A cohort of the given episodes."""
    return CohortPlan(
        environment=environment or tiny_environment(), reward=REWARD, replicate=replicate, episodes=tuple(episodes)
    )
