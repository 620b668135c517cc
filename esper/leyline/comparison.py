"""The result of an evaluation: every arm against the controls, with intervals. Written by simic, read by the report."""

from __future__ import annotations

from typing import Literal

from esper.leyline.spec_base import Spec
from esper.leyline.verdict import Level


class Interval(Spec):
    """A mean over environment seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_env_seeds: int
    method: Literal["paired t", "BCa"]


class ArmResult(Spec):
    """One arm on one environment. Accuracies in percent, gains in points, returns in units of the reward's scale.

    An episode that was rolled back counts with what it came to, one that diverged with accuracy at chance. `gain_over`
    and `return_over` are paired differences to the arm named by the key (`never-act`, `heuristic`,
    `best-fixed`).
    """

    environment: str
    arm: str
    group: Literal["control", "rule", "schedule", "from scratch", "learned"]
    test_accuracy_percent: Interval
    mean_return: Interval
    gain_over: dict[str, Interval]
    return_over: dict[str, Interval]
    seed_params: float
    growth_factor: float
    train_gflops: float
    num_diverged: int
    num_rolled_back: int = 0


class BestFixed(Spec):
    """The best fixed schedule of an environment, chosen on selection seeds, and what it was chosen from."""

    environment: str
    schedule: str
    description: str
    selection_return: float
    num_candidates: int
    num_selection_seeds: int


class ControlResult(Spec):
    """A positive or negative control of the whole run."""

    environment: str
    name: str
    value: float
    low: float
    high: float
    passed: bool


class Evaluation(Spec):
    """A whole comparison."""

    dataset: str
    version: int
    verdict: Level | None
    arms: tuple[ArmResult, ...]
    best_fixed: tuple[BestFixed, ...]
    controls: tuple[ControlResult, ...]
    created_at: str
    wall_s: float

    @property
    def failed_controls(self) -> tuple[ControlResult, ...]:
        """The controls that did not pass; any of them means that the engine or the task is wrong."""
        return tuple(control for control in self.controls if not control.passed)
