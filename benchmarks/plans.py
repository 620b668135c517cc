"""Cohorts that the benchmarks run."""

from __future__ import annotations

from esper.leyline.library import load, load_environment
from esper.leyline.matrix import Cell, CohortPlan, plan_episodes
from esper.leyline.rewards import RewardSpec

ENVIRONMENT = "digits-gap"

TINY = {"batches_per_epoch": 2, "horizon": 6, "batch_size": 32}
"""What `--quick` makes of an environment."""


def row_of_31(replicate: int = 0, behaviours: int | None = None, **changes: object) -> CohortPlan:
    """Return the matrix row of an environment seed: eleven behaviours at three epsilons, random once.

    Args:
        replicate: Which environment seed.
        behaviours: Only so many of them.
        changes: Fields of the environment.
    """
    environment = load_environment(ENVIRONMENT).model_copy(update=changes)
    cell = Cell(environment=ENVIRONMENT, reward=ENVIRONMENT, replicates=replicate + 1)
    if behaviours is not None:
        cell = cell.model_copy(update={"behaviours": cell.behaviours[:behaviours]})
    return CohortPlan(
        environment=environment,
        reward=load("rewards", ENVIRONMENT, RewardSpec),
        replicate=replicate,
        episodes=plan_episodes(cell, environment, "benchmark"),
    )


def alone(plan: CohortPlan) -> list[CohortPlan]:
    """Return a plan's episodes as cohorts of one."""
    return [plan.model_copy(update={"episodes": (episode,)}) for episode in plan.episodes]
