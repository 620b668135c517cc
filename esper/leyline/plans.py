"""From a matrix to the cohorts that carry it out."""

from __future__ import annotations

from esper.leyline.library import load
from esper.leyline.matrix import CohortPlan, MatrixSpec, plan_episodes
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec


def expand(matrix: MatrixSpec) -> list[CohortPlan]:
    """Return one cohort per environment and replicate, environments in matrix order."""
    plans = []
    for cell in matrix.cells:
        environment = load("environments", cell.environment, EnvironmentSpec)
        reward = load("rewards", cell.reward, RewardSpec)
        episodes = plan_episodes(cell, environment, pool=matrix.name)
        first = cell.first_replicate
        plans += [
            CohortPlan(environment=environment, reward=reward, replicate=replicate, episodes=episodes)
            for replicate in range(first, first + cell.replicates)
        ]
    return plans
