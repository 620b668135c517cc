"""Calibration: behaviours valued like policies, against what their own episodes returned.

A behaviour's own episodes are among the data that its values are fitted on, so this is the easy case: a method that
fails here has no say about policies that the data never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import TypeAdapter

from esper.leyline.controller_specs import ControllerSpec
from esper.leyline.ope import BehaviourCheck, RankingQuality, ValueEstimate
from esper.simic.batches import Floats, Ints
from esper.simic.ope.fqe import Starts
from esper.simic.ope.logged import Logged, behaviour_key
from esper.simic.ope.ranking import ranking_quality

CONTROLLER: TypeAdapter[ControllerSpec] = TypeAdapter(ControllerSpec)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A behaviour of the data with known propensities: the rule, its epsilon and its episodes."""

    spec: ControllerSpec
    epsilon: float
    episodes_E: Ints

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.spec.spec_id} {self.epsilon!r}"

    @property
    def name(self) -> str:
        """Its name with its epsilon where it explores."""
        return self.spec.name if self.epsilon in (0.0, 1.0) else f"{self.spec.name} ε {self.epsilon:g}"


def behaviours_of(logged: Logged) -> tuple[list[Behaviour], int]:
    """Return the behaviours whose value the data know, in a fixed order, and how many others there are.

    Left out are those without propensities (the schedule-sampler), with a temperature, learned ones, and those with
    fewer than two env_seeds. Branched episodes belong to no behaviour.
    """
    known, branched = logged.with_propensity, logged.branched
    groups: dict[str, list[int]] = {}
    for index, episode in enumerate(logged.episodes):
        if not branched[index] and episode["root"] == "host":
            groups.setdefault(behaviour_key(episode), []).append(index)
    found, left_out = [], 0
    for rows in groups.values():
        first = logged.episodes[rows[0]]
        spec = CONTROLLER.validate_json(first["controller_spec"])
        seeds = {logged.episodes[row]["env_seed"] for row in rows}
        rule = spec.kind in ("heuristic", "random", "never-act", "schedule") and first["temperature"] is None
        if not rule or not known[rows].all() or len(seeds) < 2:
            left_out += 1
            continue
        found.append(Behaviour(spec, float(first["epsilon"]), np.array(rows)))
    return sorted(found, key=lambda item: (item.spec.name, item.epsilon)), left_out


def spread_out(behaviours: Sequence[Behaviour], limit: int) -> list[Behaviour]:
    """Return at most `limit` behaviours: each rule once before any rule twice, their epsilons taken in turn."""
    by_rule: dict[str, list[Behaviour]] = {}
    for behaviour in behaviours:
        by_rule.setdefault(behaviour.spec.spec_id, []).append(behaviour)
    rules = list(by_rule.values())
    rounds = max((len(rule) for rule in rules), default=0)
    chosen = [
        rule[(place + turn) % len(rule)]
        for turn in range(rounds)
        for place, rule in enumerate(rules)
        if turn < len(rule)
    ]
    return chosen[:limit]


def rank_behaviours(checks: Sequence[BehaviourCheck], data_return: Mapping[str, float]) -> list[RankingQuality]:
    """Return how well the estimates rank the behaviours, by environment; at least three are needed.

    Args:
        checks: Behaviours with their estimates and measured returns.
        data_return: The data's mean return by environment.
    """
    found = []
    for name in dict.fromkeys(check.environment for check in checks):
        of = {f"{c.behaviour} ε {c.epsilon:g}": c for c in checks if c.environment == name}
        estimates = {label: check.fqe.mean for label, check in of.items()}
        measured = {label: check.measured_return for label, check in of.items()}
        quality = ranking_quality(name, estimates, measured, data_return[name])
        if quality is not None:
            found.append(quality)
    return found


def measured_returns(behaviour: Behaviour, logged: Logged, starts: Starts) -> tuple[Floats, Ints]:
    """Return the mean return of a behaviour by environment, then their mean, and the env_seeds of each.

    Episodes of one env_seed are averaged first. An environment that the behaviour never met has NaN; the mean is over
    the others.
    """
    totals: dict[tuple[int, int], list[float]] = {}
    returns = logged.returns
    names = logged.transitions.environments
    for row in behaviour.episodes_E.tolist():
        episode = logged.episodes[row]
        totals.setdefault((names.index(episode["environment"]), episode["env_seed"]), []).append(returns[row])
    num = int(starts.environment_S.max()) + 1
    by_environment: list[list[float]] = [[] for _ in range(num)]
    for (environment, _), values in totals.items():
        by_environment[environment].append(float(np.mean(values)))
    means = np.array([np.mean(values) if values else np.nan for values in by_environment])
    counts = np.array([len(values) for values in by_environment])
    seeds = len({seed for _, seed in totals})
    return np.append(means, np.nanmean(means)), np.append(counts, seeds)


def check_behaviour(
    behaviour: Behaviour, estimates: list[ValueEstimate], logged: Logged, starts: Starts, names: list[str]
) -> list[BehaviourCheck]:
    """Return the behaviour's estimate against its measured return, by environment and on their mean.

    Where it met only some of the environments, the mean over all of them is no check and is left out.
    """
    measured, counts = measured_returns(behaviour, logged, starts)
    whole = bool((counts[:-1] > 0).all())
    return [
        BehaviourCheck(
            behaviour=behaviour.spec.name,
            epsilon=behaviour.epsilon,
            environment=name,
            num_env_seeds=int(counts[i]),
            measured_return=float(measured[i]),
            fqe=estimates[i],
            covered=estimates[i].low <= measured[i] <= estimates[i].high,
        )
        for i, name in enumerate(names)
        if counts[i] > 1 and (whole or i < len(names) - 1)
    ]
