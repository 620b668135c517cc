"""What adding episodes to a dataset would do to its checks: sums that add up, and the values that follow from them.

The sums are first estimates. An arm that is in the dataset is expected to go on as it did; one that is not is mixed
from what is known of its behaviour and of the uniform policy in the same states; a forced action is certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from esper.leyline.actions import NUM_OPS, Bools, Op
from esper.leyline.verdict import CheckResult, Level
from quality.suggest_data import ActionCounts, Arm, Findings, Site

Floats = NDArray[np.float64]

VALID = slice(0, NUM_OPS)
TAKEN = slice(NUM_OPS, 2 * NUM_OPS)


class Part(IntEnum):
    """The other places of a vector of sums, after how often each op was valid and how often it was taken."""

    STATES = 2 * NUM_OPS
    COMPARED = 2 * NUM_OPS + 1
    SINGLE_CLUSTERS = 2 * NUM_OPS + 2
    BEHAVIOURS = 2 * NUM_OPS + 3
    TWINS = 2 * NUM_OPS + 4
    TEMPO_PAIRS = 2 * NUM_OPS + 5
    VALUES = 2 * NUM_OPS + 6
    EPISODES = 2 * NUM_OPS + 7
    HISTORIES = 2 * NUM_OPS + 8


WIDTH = 2 * NUM_OPS + len(Part)

PREDICTED: Mapping[str, str] = {
    "action_coverage": "low",
    "action_entropy": "low",
    "single_action_clusters": "high",
    "distinct_actions_per_state": "low",
    "policy_diversity": "low",
    "identical_behaviours": "high",
    "equal_histories": "high",
    "blueprint_tempo_pairs": "low",
    "value_coverage": "low",
}
"""Checks whose value can be predicted, and the side on which each is bad."""

PER_ENVIRONMENT = ("identical_behaviours", "equal_histories")
"""Checks that are decided by environment; of the second the worst environment is predicted."""

SHARES = frozenset(PREDICTED) - {"action_entropy", "policy_diversity", "identical_behaviours"}
"""Predicted checks whose value is a share."""

PROXIES: Mapping[str, tuple[str, ...]] = {
    "normalised_entropy": ("action_entropy",),
    "actions_per_cluster": ("single_action_clusters", "distinct_actions_per_state"),
    "value_env_seeds": ("blueprint_tempo_pairs", "value_coverage"),
    "slot_op_pairs": ("value_coverage",),
    "constant_features": ("blueprint_tempo_pairs", "value_coverage"),
    "overlap": ("action_coverage", "action_entropy"),
    "effective_sample_size": ("action_coverage", "action_entropy"),
    "unseen_mass": ("distinct_actions_per_state",),
}
"""Checks that are not predicted, and those that move with them; a name counts by its beginning."""

_WEIGHT = {Level.BLOCK: 8.0, Level.WARN: 2.0, Level.PASS: 0.25, Level.REPORT: 0.25}
FAILING = (Level.BLOCK, Level.WARN)

MARGIN = 0.2
"""How far beyond a threshold a remedy aims: an estimate that just reaches it would fail half of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One predicted check: what it is worth, where it is, and where it should get."""

    check: str
    weight: float
    now: float
    target: float

    def progress(self, value_N: Floats) -> Floats:
        """Return the weighted share of the way from now to the target, float64 [N]; nothing is won beyond it."""
        share = (value_N - self.now) / (self.target - self.now)
        result: Floats = self.weight * np.clip(share, -2.0, 1.0)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sums of a dataset, and what they say about its checks.

    Attributes:
        base: The sums now, [WIDTH].
        clusters: State clusters.
        tempo_pairs: Pairs of blueprint and tempo on offer.
        values_on_offer: Pairs of slot and op, and values of levers, on offer.
        repeating: The environment with the largest share of repeated histories.
    """

    base: Floats
    clusters: int
    tempo_pairs: int
    values_on_offer: int
    repeating: str

    def predict(self, sums_NW: Floats) -> dict[str, Floats]:
        """Return the value of each predicted check, float64 [N], from sums [N, WIDTH]."""
        valid, taken = sums_NW[:, VALID], sums_NW[:, TAKEN]
        share = np.divide(taken, valid, out=np.ones_like(taken), where=valid > 0)
        total = np.maximum(taken.sum(axis=1, keepdims=True), 1.0)
        return {
            "action_coverage": share.min(axis=1),
            "action_entropy": entr(taken / total).sum(axis=1),
            "single_action_clusters": sums_NW[:, Part.SINGLE_CLUSTERS] / max(self.clusters, 1),
            "distinct_actions_per_state": sums_NW[:, Part.COMPARED] / np.maximum(sums_NW[:, Part.STATES], 1.0),
            "policy_diversity": sums_NW[:, Part.BEHAVIOURS],
            "identical_behaviours": sums_NW[:, Part.TWINS],
            "equal_histories": 1 - sums_NW[:, Part.HISTORIES] / np.maximum(sums_NW[:, Part.EPISODES], 1.0),
            "blueprint_tempo_pairs": np.minimum(sums_NW[:, Part.TEMPO_PAIRS] / max(self.tempo_pairs, 1), 1.0),
            "value_coverage": np.minimum(sums_NW[:, Part.VALUES] / max(self.values_on_offer, 1), 1.0),
        }

    def values(self, sums: Floats) -> dict[str, float]:
        """Return the values of one vector of sums."""
        return {name: float(value[0]) for name, value in self.predict(sums[None]).items()}


@dataclass(slots=True)
class Choice:
    """What has been chosen so far.

    Attributes:
        sums: The dataset's sums with it, [WIDTH].
        survival: Per state cluster, the chance that it still holds a single op, [C].
        episodes: New episodes.
        epochs: Host epochs that they cost, at most.
    """

    sums: Floats
    survival: Floats
    episodes: int = 0
    epochs: int = 0

    def add(self, delta: Floats, survival: Floats, episodes: int, epochs: int) -> None:
        """Take something more."""
        self.sums = self.sums + delta
        self.survival = survival
        self.episodes += episodes
        self.epochs += epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The model of a dataset and what a remedy should reach."""

    model: Model
    goals: tuple[Goal, ...]

    def begin(self, findings: Findings) -> Choice:
        """Return the choice of nothing."""
        return Choice(self.model.base.copy(), (findings.cluster_ops.sum(axis=1) == 1).astype(np.float64))

    def lift(self, choice: Choice, deltas_NW: Floats) -> Floats:
        """Return the weighted progress of all goals that each delta brings, float64 [N]."""
        before = self._score(choice.sums[None])
        result: Floats = self._score(choice.sums + deltas_NW) - before
        return result

    def _score(self, sums_NW: Floats) -> Floats:
        predicted = self.model.predict(sums_NW)
        parts = [goal.progress(predicted[goal.check]) for goal in self.goals]
        return np.sum(parts, axis=0) if parts else np.zeros(len(sums_NW))


def model_of(findings: Findings, checks: tuple[CheckResult, ...]) -> Model:
    """Return the model of a dataset; what only the verdict knows (distinct behaviours) comes from there."""
    base = np.zeros(WIDTH)
    for arm in findings.arms.values():
        base[VALID] += arm.valid * arm.episodes
        base[TAKEN] += arm.taken * arm.episodes
    base[Part.STATES] = len(findings.states.step)
    base[Part.COMPARED] = (findings.states.actions > 1).sum()
    base[Part.SINGLE_CLUSTERS] = (findings.cluster_ops.sum(axis=1) == 1).sum()
    diversity = [c.value for c in checks if c.name == "policy_diversity" and c.environment == "all"]
    base[Part.BEHAVIOURS] = diversity[0] if diversity and diversity[0] is not None else 0.0
    twins = [c.value for c in checks if c.name == "identical_behaviours" and c.environment in findings.sites]
    base[Part.TWINS] = sum(value for value in twins if value is not None)
    repeating = max(findings.histories, key=lambda name: 1 - np.divide(*findings.histories[name][::-1]))
    base[Part.EPISODES], base[Part.HISTORIES] = findings.histories[repeating]
    pairs_on_offer = values_on_offer = 0
    for name, site in findings.sites.items():
        counts = findings.counts.get(name, ActionCounts.empty())
        pairs, values = unseen_pairs(site, counts), unseen_values(site, counts)
        masks = site.spec.lever_masks()
        offered = (
            masks[0].sum() * masks[2].sum(),
            site.spec.enabled_slots.sum() * (NUM_OPS - 1) + sum(m.sum() for m in masks),
        )
        pairs_on_offer += int(offered[0])
        values_on_offer += int(offered[1])
        base[Part.TEMPO_PAIRS] += offered[0] - pairs.sum()
        base[Part.VALUES] += offered[1] - sum(part.sum() for part in values)
    return Model(
        base=base,
        clusters=len(findings.cluster_ops),
        tempo_pairs=pairs_on_offer,
        values_on_offer=values_on_offer,
        repeating=repeating,
    )


def unseen_pairs(site: Site, counts: ActionCounts) -> Bools:
    """Return which pairs of blueprint and tempo on offer were never taken, bool [8, 4]."""
    masks = site.spec.lever_masks()
    result: Bools = (counts.blueprint_tempos == 0) & masks[0][:, None] & masks[2][None]
    return result


def unseen_values(site: Site, counts: ActionCounts) -> tuple[Bools, ...]:
    """Return what on offer was never taken: slot by op (without WAIT) bool [slots, 4], then the values by lever."""
    enabled = site.spec.enabled_slots
    slots = (counts.slot_ops[: len(enabled), 1:] == 0) & enabled[:, None]
    levers = (mask & (taken == 0) for mask, taken in zip(site.spec.lever_masks(), counts.levers, strict=True))
    return (slots, *levers)


def found_by_chance(unseen: Bools, choices: int, draws: float) -> float:
    """Return how many of the unseen values that many uniform draws among `choices` are expected to find."""
    missed: float = (1 - 1 / max(choices, 1)) ** draws
    return float(unseen.sum()) * (1 - missed)


def goals_of(checks: tuple[CheckResult, ...], model: Model) -> tuple[Goal, ...]:
    """Return what a remedy should reach: a failing check beyond its threshold, every other one a fifth further."""
    now = model.values(model.base)
    weights = dict.fromkeys(PREDICTED, 0.0)
    targets: dict[str, float] = {}
    for check in checks:
        if check.name in PREDICTED:
            weights[check.name] = max(weights[check.name], _WEIGHT[check.level])
            limit = check.block_threshold if check.warn_threshold is None else check.warn_threshold
            if check.level in FAILING and limit is not None:
                targets[check.name] = limit
        elif check.level in FAILING:
            for beginning, names in PROXIES.items():
                for name in names if check.name.startswith(beginning) else ():
                    weights[name] = max(weights[name], _WEIGHT[check.level] / 2)
    goals = []
    for name, side in PREDICTED.items():
        low = side == "low"
        further = now[name] * 1.2 + 0.01 if low else now[name] * 0.8
        limit = targets.get(name, now[name]) * (1 + MARGIN if low else 1 - MARGIN)
        target = max(limit, further) if low else min(limit, further)
        if weights[name] and target != now[name]:
            goals.append(Goal(check=name, weight=weights[name], now=now[name], target=target))
    return tuple(goals)


def expected_arm(findings: Findings, environment: str, controller: str, epsilon: float) -> Arm:
    """Return what one more episode of an arm is expected to add, per episode, in an environment of the dataset."""
    arms = findings.arms
    known = arms.get((environment, controller, epsilon))
    if known is not None:
        return known
    here = [arm for (name, _, _), arm in arms.items() if name == environment]
    mean = _mean(here)
    if controller == "random":
        return _with_taken(mean, mean.uniform)
    if controller == "schedule-sampler":
        return _with_taken(mean, _plan_of_two(mean))
    same = [(e, arm) for (name, who, e), arm in arms.items() if (name, who) == (environment, controller)]
    nearest_epsilon, nearest = min(same, key=lambda found: abs(found[0] - epsilon)) if same else (0.0, mean)
    share = np.clip((epsilon - nearest_epsilon) / (1.0 - min(nearest_epsilon, 0.99)), -1.0, 1.0)
    return _with_taken(nearest, np.maximum((1 - share) * nearest.taken + share * nearest.uniform, 0.0))


def _mean(arms: list[Arm]) -> Arm:
    weights = np.array([arm.episodes for arm in arms], dtype=np.float64)
    parts = {
        kind: np.average([getattr(arm, kind) for arm in arms], axis=0, weights=weights)
        for kind in ("valid", "taken", "uniform")
    }
    states = float(np.average([arm.states for arm in arms], weights=weights))
    return Arm(**parts, states=states, episodes=int(weights.sum()))


def _with_taken(arm: Arm, taken: Floats) -> Arm:
    return Arm(
        valid=np.maximum(arm.valid, taken), taken=taken, uniform=arm.uniform, states=arm.states, episodes=arm.episodes
    )


def _plan_of_two(mean: Arm) -> Floats:
    """A plan holds one to three seeds, each carried to its end as far as the horizon allows: two on average."""
    taken = np.zeros(NUM_OPS)
    taken[[Op.GERMINATE, Op.ADVANCE, Op.FOSSILIZE]] = 2.0
    taken[Op.WAIT] = max(0.0, mean.taken.sum() - taken.sum())
    return taken
