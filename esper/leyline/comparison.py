"""The result of an evaluation: every arm against the controls, with intervals. Written by simic, read by the report."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esper.leyline.spec_base import Spec
from esper.leyline.verdict import Level

Group = Literal["control", "rule", "schedule", "from scratch", "learned"]


class Interval(Spec):
    """A mean, or an interquartile mean, with its 95 % interval.

    Attributes:
        num_env_seeds: Environment seeds, the unit of independence. On a family every one of them is a block: the mean
            over the members, all of which it was run on.
        method: Student's t over the seeds, the BCa bootstrap over them, or the bootstrap that draws controller seeds
            and environment seeds apart (all controllers met on the same seeds).
        num_controller_seeds: Policies of one algorithm that went into it.
    """

    mean: float
    low: float
    high: float
    num_env_seeds: int
    method: Literal["paired t", "BCa", "crossed bootstrap"]
    num_controller_seeds: int = 1


class ArmResult(Spec):
    """One arm on one environment. Accuracies in percent, gains in points, returns in units of the reward's scale.

    An episode that was rolled back counts with what it came to, one that diverged with accuracy at chance. `gain_over`
    and `return_over` are paired differences to the arm named by the key (`never-act`, `heuristic`,
    `best-fixed`, and `bandit` where there is one).

    Attributes:
        environment: An environment, or a family: then everything is a mean over its members.
        predicted_return: What off-policy evaluation had said of a policy, None where it was not asked.
    """

    environment: str
    arm: str
    group: Group
    test_accuracy_percent: Interval
    mean_return: Interval
    gain_over: dict[str, Interval]
    return_over: dict[str, Interval]
    seed_params: float
    growth_factor: float
    train_gflops: float
    num_diverged: int
    num_rolled_back: int = 0
    predicted_return: float | None = None


class AlgorithmResult(Spec):
    """The policies of one algorithm, trained from several controller seeds, as one row.

    Intervals hold for a new controller seed on a new environment seed. `iqm_return` and `iqm_return_over` are
    interquartile means over (controller seed, environment seed).
    """

    environment: str
    algorithm: str
    policies: tuple[str, ...]
    test_accuracy_percent: Interval
    mean_return: Interval
    iqm_return: Interval
    gain_over: dict[str, Interval]
    return_over: dict[str, Interval]
    iqm_return_over: dict[str, Interval]
    growth_factor: float
    train_gflops: float
    num_diverged: int
    num_rolled_back: int
    predicted_return: float | None = None


class BestFixed(Spec):
    """The best fixed schedule of an environment or a family, chosen on selection seeds, and from what."""

    environment: str
    schedule: str
    description: str
    selection_return: float
    num_candidates: int
    num_selection_seeds: int


class BanditResult(Spec):
    """What a schedule bandit chose on live selection episodes.

    Attributes:
        num_arms: Schedules it could choose among.
        num_pulls: Episodes it ran.
        num_lost: Those among them that told nothing: failed, or without a valid control.
        times_pulled: How often it ran the schedule that it chose.
        posterior_mean: Its belief about the return of that schedule.
        posterior_sd: How sure it was.
        noise_sd: Its estimate of the spread of one episode's return.
    """

    environment: str
    schedule: str
    description: str
    num_arms: int
    num_pulls: int
    num_lost: int
    times_pulled: int
    posterior_mean: float
    posterior_sd: float
    noise_sd: float


class ControlResult(Spec):
    """A positive or negative control of the whole run."""

    environment: str
    name: str
    value: float
    low: float
    high: float
    passed: bool


class Evaluation(Spec):
    """A whole comparison.

    Attributes:
        arms: Every arm on every environment, or on the pooled members of a family.
        members: Every arm on every member of the families.
        algorithms: The algorithms of which there are several policies, on environments, families and members.
        families: The members' environments by family.
    """

    dataset: str
    version: int
    verdict: Level | None
    arms: tuple[ArmResult, ...]
    best_fixed: tuple[BestFixed, ...]
    controls: tuple[ControlResult, ...]
    created_at: str
    wall_s: float
    members: tuple[ArmResult, ...] = ()
    algorithms: tuple[AlgorithmResult, ...] = ()
    bandits: tuple[BanditResult, ...] = ()
    families: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @property
    def failed_controls(self) -> tuple[ControlResult, ...]:
        """The controls that did not pass; any of them means that the engine or the task is wrong."""
        return tuple(control for control in self.controls if not control.passed)


class Trial(Spec):
    """One policy's way through a selection: what was predicted of it, and how it did on live selection episodes.

    Attributes:
        live_return: The mean over the environments (a family is one); None for those that were not among the first
            few by prediction.
    """

    policy: str
    predicted_return: float
    live_return: float | None = None
    live_by_environment: dict[str, Interval] = Field(default_factory=dict)


class PolicySelection(Spec):
    """A selection by evidence: ranked by off-policy evaluation, the first few tried live, one winner.

    Attributes:
        candidates: Best prediction first.
        winner: Highest mean live return on the selection seeds; the better prediction where two tie.
        num_selection_seeds: Environment seeds of each environment on which the first few met.
    """

    dataset: str
    version: int
    candidates: tuple[Trial, ...]
    winner: str
    num_selection_seeds: int
