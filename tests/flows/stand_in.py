"""Engines for the pool: synthetic tables for every plan, and ways to fail. Importable by spawned workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pyarrow as pa
from factories import _cohort

from esper.leyline.library import load
from esper.leyline.matrix import Cell, CohortPlan, plan_episodes
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec


def synthetic(plan: CohortPlan) -> dict[str, pa.Table]:
    return _cohort(plan, 0, 0.0)


def dies_on_replicate_1(plan: CohortPlan) -> dict[str, pa.Table]:
    if plan.replicate == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return synthetic(plan)


def raises_on_replicate_1(plan: CohortPlan) -> dict[str, pa.Table]:
    if plan.replicate == 1:
        raise ZeroDivisionError("made up")
    return synthetic(plan)


def raises_once(plan: CohortPlan) -> dict[str, pa.Table]:
    """Fails the first time it meets replicate 1: a file in the working directory remembers."""
    marker = Path("failed-once")
    if plan.replicate == 1 and not marker.exists():
        marker.touch()
        raise ZeroDivisionError("made up")
    return synthetic(plan)


def sleeps(plan: CohortPlan) -> dict[str, pa.Table]:
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(300)
    return {}


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def omp_threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def plans(
    replicates: int, *, behaviours: tuple[str, ...] = ("baseline", "random"), horizon: int = 3
) -> list[CohortPlan]:
    environment = load("environments", "digits-gap", EnvironmentSpec).model_copy(update={"horizon": horizon})
    cell = Cell(environment="digits-gap", reward="digits-gap", behaviours=behaviours, epsilons=(0.0,), replicates=1)
    reward = load("rewards", "digits-gap", RewardSpec)
    episodes = plan_episodes(cell, environment, pool="test")
    return [
        CohortPlan(environment=environment, reward=reward, replicate=replicate, episodes=episodes)
        for replicate in range(replicates)
    ]
