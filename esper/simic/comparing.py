"""From the outcomes of a contest to rows of results: arms, and algorithms that several controller seeds stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from esper.leyline.comparison import AlgorithmResult, ArmResult, ControlResult, Interval
from esper.leyline.pipelines import ControlBounds
from esper.simic.arms import BEST_FIXED, NEVER_ACT, REFERENCES, Arm, Floats
from esper.simic.contest import Contest, Outcomes
from esper.simic.crossed import crossed_interval
from esper.simic.statistics import mean_interval, paired_interval

MAX_LEFT_OUT_SHARE = 0.2
"""Where more trunks than this diverge or roll back, it is the environment that does not train."""

_SEED_SUFFIX = re.compile(r"-s\d+$")


def algorithm_of(policy: str) -> str:
    """Return the algorithm of a policy's name: `iql-s3` is the fourth controller seed of `iql`."""
    return _SEED_SUFFIX.sub("", policy)


def arm_results(
    environment: str, arms: Sequence[Arm], outcomes: Outcomes, predicted: Mapping[str, float]
) -> list[ArmResult]:
    """Return one row per arm.

    Args:
        environment: The name that the rows bear.
        arms: The arms.
        outcomes: What they came to.
        predicted: What off-policy evaluation said, by policy.
    """
    return [_arm_result(environment, arm, arms, outcomes, predicted.get(arm.name)) for arm in arms]


def _arm_result(
    environment: str, arm: Arm, arms: Sequence[Arm], outcomes: Outcomes, predicted: float | None
) -> ArmResult:
    test, returns = (outcomes.values(arm.name, field) for field in ("test_percent", "episode_return"))
    key = ("evaluation", environment, arm.name)
    others = _references(arms, without=arm.name)

    def over(field: str, own: Floats, word: str) -> dict[str, Interval]:
        return {other: paired_interval(own, outcomes.values(other, field), key=(*key, word, other)) for other in others}

    return ArmResult(
        environment=environment,
        arm=arm.name,
        group=arm.group,
        test_accuracy_percent=mean_interval(test, key=(*key, "test")),
        mean_return=mean_interval(returns, key=(*key, "return")),
        gain_over=over("test_percent", test, "test"),
        return_over=over("episode_return", returns, "return"),
        seed_params=float(outcomes.values(arm.name, "added_params").mean()),
        growth_factor=float(outcomes.values(arm.name, "growth_factor").mean()),
        train_gflops=float(outcomes.values(arm.name, "train_flops").mean()) / 1e9,
        num_diverged=outcomes.count(arm.name, "diverged"),
        num_rolled_back=outcomes.count(arm.name, "rolled_back"),
        predicted_return=predicted,
    )


def _references(arms: Sequence[Arm], *, without: str) -> list[str]:
    names = {arm.name for arm in arms}
    return [name for name in REFERENCES if name in names and name != without]


def algorithm_results(
    environment: str, arms: Sequence[Arm], outcomes: Outcomes, predicted: Mapping[str, float]
) -> list[AlgorithmResult]:
    """Return one row per algorithm of which there are several policies, in the order of their first ones."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm.group == "learned":
            groups.setdefault(algorithm_of(arm.name), []).append(arm.name)
    references = _references(arms, without="")
    return [
        _algorithm_result(environment, name, policies, references, outcomes, predicted)
        for name, policies in groups.items()
        if len(policies) > 1
    ]


def _algorithm_result(
    environment: str,
    algorithm: str,
    policies: Sequence[str],
    references: Sequence[str],
    outcomes: Outcomes,
    predicted: Mapping[str, float],
) -> AlgorithmResult:
    def matrix(field: str) -> Floats:
        return np.stack([outcomes.values(name, field) for name in policies])

    key = ("algorithm", environment, algorithm)
    test, returns = matrix("test_percent"), matrix("episode_return")
    gains = {name: test - outcomes.values(name, "test_percent") for name in references}
    paired = {name: returns - outcomes.values(name, "episode_return") for name in references}
    known = [predicted[name] for name in policies if name in predicted]
    return AlgorithmResult(
        environment=environment,
        algorithm=algorithm,
        policies=tuple(policies),
        test_accuracy_percent=crossed_interval(test, key=(*key, "test")),
        mean_return=crossed_interval(returns, key=(*key, "return")),
        iqm_return=crossed_interval(returns, key=(*key, "return"), statistic="iqm"),
        gain_over={name: crossed_interval(values, key=(*key, "test", name)) for name, values in gains.items()},
        return_over={name: crossed_interval(values, key=(*key, "return", name)) for name, values in paired.items()},
        iqm_return_over={
            name: crossed_interval(values, key=(*key, "return", name), statistic="iqm")
            for name, values in paired.items()
        },
        growth_factor=float(matrix("growth_factor").mean()),
        train_gflops=float(matrix("train_flops").mean()) / 1e9,
        num_diverged=sum(outcomes.count(name, "diverged") for name in policies),
        num_rolled_back=sum(outcomes.count(name, "rolled_back") for name in policies),
        predicted_return=float(np.mean(known)) if len(known) == len(policies) else None,
    )


def _control(environment: str, name: str, value: float, low: float, high: float) -> ControlResult:
    return ControlResult(
        environment=environment, name=name, value=value, low=low, high=high, passed=low <= value <= high
    )


def seed_controls(contest: Contest, outcomes: Outcomes) -> list[ControlResult]:
    """Return whatever was left out of a comparison, and how much of it is tolerated."""
    name = contest.field.name
    tolerated = float(int(MAX_LEFT_OUT_SHARE * len(contest.plans)))
    return [
        _control(name, "seeds without a valid control", outcomes.num_control_invalid, 0.0, tolerated),
        _control(name, "failed episodes", outcomes.num_failed, 0.0, 0.0),
    ]


def bound_controls(
    contest: Contest, bounds: Sequence[ControlBounds], results: Mapping[str, ArmResult]
) -> list[ControlResult]:
    """Return how a contest's arms stand to what a healthy run shows."""
    found = []
    environment = contest.field.name
    best_gain = results[BEST_FIXED].gain_over[NEVER_ACT]
    for bound in bounds:
        if bound.environment != contest.field.cell.environment:
            continue
        if bound.never_act_percent is not None:
            never = results[NEVER_ACT].test_accuracy_percent.mean
            found.append(_control(environment, "never-act test accuracy (%)", never, *bound.never_act_percent))
        found.append(_control(environment, "best fixed gain (points)", best_gain.mean, *bound.best_fixed_gain_points))
        if bound.best_fixed_lower_bound_points is not None:
            name = "lower 95 % bound of it (points)"
            found.append(_control(environment, name, best_gain.low, bound.best_fixed_lower_bound_points, 100.0))
    return found
