"""Cells that a remedy could hold: behaviours x epsilons x replicates that a dataset does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import Op
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS
from esper.leyline.matrix import Cell, PlannedEpisode, plan_episodes
from quality.suggest_data import ActionCounts, Findings, Site, episode_id_of
from quality.suggest_effects import (
    TAKEN,
    VALID,
    WIDTH,
    Aim,
    Choice,
    Part,
    expected_arm,
    found_by_chance,
    unseen_pairs,
    unseen_values,
)

Floats = NDArray[np.float64]

EXPLORING = (0.1, 0.2)
EXPLORERS = (4, 8)
NEW_REPLICATES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a cell could hold; a matrix has one cell per environment.

    Attributes:
        environment: The environment.
        fields: The fields of a Cell, without the replicates.
        replicates: The replicates, contiguous, over which it may grow.
        why: In words.
    """

    environment: str
    fields: Mapping[str, object]
    replicates: tuple[int, ...]
    why: str

    def cell(self, site: Site, count: int) -> Cell:
        """Return the cell over the first `count` replicates."""
        place = {"environment": self.environment, "reward": site.reward, "first_replicate": self.replicates[0]}
        return Cell.parse({**place, **self.fields, "replicates": count}, "a suggestion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One more replicate of an option: what is new in it and what it is expected to bring."""

    rate: float
    option: Option
    count: int
    fresh: tuple[PlannedEpisode, ...]
    delta: Floats
    survival: Floats


class Cells:
    """The cells of a remedy, grown replicate by replicate: at most one option per environment."""

    def __init__(self, findings: Findings, aim: Aim, pool: str, options: Mapping[str, Option]) -> None:
        self.findings = findings
        self.aim = aim
        self.pool = pool
        self.options = options
        self.chosen: dict[str, int] = {}
        self.new_behaviours: set[str] = set()

    def best(self, choice: Choice, room: int) -> Offer | None:
        """Return the replicate that brings most per host epoch, None where nothing fits into `room` episodes."""
        following = [(option, self.chosen.get(name, 0) + 1) for name, option in self.options.items()]
        offers = [
            self._offer(choice, option, count, fresh)
            for option, count in following
            if count <= len(option.replicates) and 0 < len(fresh := self._new_episodes(option, count)) <= room
        ]
        return max(offers, key=lambda offer: offer.rate, default=None)

    def take(self, choice: Choice, offer: Offer) -> None:
        """Add an offer to the choice."""
        name = offer.option.environment
        self.chosen[name] = offer.count
        self.new_behaviours |= self._behaviours(offer.fresh)
        epochs = len(offer.fresh) * self.findings.sites[name].spec.horizon
        choice.add(offer.delta, offer.survival, len(offer.fresh), epochs)

    def cells(self) -> tuple[Cell, ...]:
        """Return the chosen cells, by environment."""
        sites = self.findings.sites
        return tuple(self.options[name].cell(sites[name], count) for name, count in sorted(self.chosen.items()))

    def _new_episodes(self, option: Option, count: int) -> tuple[PlannedEpisode, ...]:
        """The episodes of an option's `count`-th replicate that the dataset does not have."""
        site, replicate = self.findings.sites[option.environment], option.replicates[count - 1]
        planned = plan_episodes(option.cell(site, 1), site.spec, self.pool)
        known = self.findings.known
        return tuple(e for e in planned if episode_id_of(e, site.spec, replicate) not in known)

    def _offer(self, choice: Choice, option: Option, count: int, fresh: tuple[PlannedEpisode, ...]) -> Offer:
        delta, survival = np.zeros(WIDTH), choice.survival
        base = self.aim.model.base
        compared = base[Part.COMPARED] / max(base[Part.STATES], 1)
        rows_C = self.findings.cluster_rows / max(self.findings.cluster_rows.sum(), 1)
        for episode in fresh:
            arm = expected_arm(self.findings, option.environment, episode.controller.name, episode.epsilon)
            delta[VALID] += arm.valid
            delta[TAKEN] += arm.taken
            delta[Part.STATES] += arm.states
            delta[Part.COMPARED] += arm.states * compared
            # An exploring decision in a cluster is another op than the cluster's in about half of the cases.
            survival = survival * np.exp(-0.5 * episode.epsilon * arm.taken.sum() * rows_C)
        delta[Part.SINGLE_CLUSTERS] = (survival - choice.survival).sum()
        delta[Part.BEHAVIOURS] = len(self._behaviours(fresh) - self.new_behaviours)
        delta[Part.TWINS] = self._twins(option, count)
        if option.environment == self.aim.model.repeating:
            episodes, distinct = self.findings.histories[option.environment]
            delta[Part.EPISODES] = len(fresh)
            delta[Part.HISTORIES] = sum(1.0 if _explores(e) else distinct / episodes for e in fresh)
        self._add_values(delta, option, count, fresh)
        cost = len(fresh) * self.findings.sites[option.environment].spec.horizon
        rate = float(self.aim.lift(choice, delta[None])[0]) / cost
        return Offer(rate=rate, option=option, count=count, fresh=fresh, delta=delta, survival=survival)

    def _add_values(self, delta: Floats, option: Option, count: int, fresh: Sequence[PlannedEpisode]) -> None:
        """What exploring germinations are expected to find among the values that were never taken.

        The first plans of a pool are declared ones with default levers: explorers count for nothing here.
        """
        site = self.findings.sites[option.environment]
        counts = self.findings.counts.get(option.environment, ActionCounts.empty())
        per_replicate = 0.0
        for episode in fresh:
            arm = expected_arm(self.findings, option.environment, episode.controller.name, episode.epsilon)
            per_replicate += episode.epsilon * float(arm.taken[Op.GERMINATE])
        slots = int(site.spec.enabled_slots.sum())
        sizes = (slots, *(int(mask.sum()) for mask in site.spec.lever_masks()))
        pairs = unseen_pairs(site, counts)
        for sign, draws in ((1, per_replicate * count), (-1, per_replicate * (count - 1))):
            values = zip(unseen_values(site, counts), sizes, strict=True)
            delta[Part.VALUES] += sign * sum(found_by_chance(unseen, size, draws) for unseen, size in values)
            delta[Part.TEMPO_PAIRS] += sign * found_by_chance(pairs, sizes[1] * sizes[3], draws)

    def _behaviours(self, fresh: Sequence[PlannedEpisode]) -> set[str]:
        """The behaviours that the dataset does not have; every plan of an explorer is one, whatever its pool."""
        known = {who for _, who, _ in self.findings.arms}
        named = {episode.controller.name for episode in fresh} - known - {"schedule-sampler"}
        plans = {e.repetition for e in fresh if e.controller.name == "schedule-sampler"} - self.findings.plans
        return named | {f"plan {plan}" for plan in plans}

    def _twins(self, option: Option, count: int) -> float:
        """The rule of succession: behaviours that agreed on n env_seeds agree on r more with chance (n+1)/(n+r+1)."""
        site = self.findings.sites[option.environment]
        twins = self.findings.twins.get(option.environment, ())
        cell = option.cell(site, 1)
        covered = all(who in cell.behaviours and epsilon in cell.epsilons for who, epsilon in twins)
        if not twins or not covered or option.replicates[0] in site.replicates:
            return 0.0
        seeds = len(site.replicates)
        agree = [(seeds + 1) / (seeds + more + 1) for more in (count - 1, count)]
        return (agree[1] - agree[0]) * len(twins) / 2


def _explores(episode: PlannedEpisode) -> bool:
    return episode.epsilon > 0 or episode.controller.name == "schedule-sampler"


def cell_options(findings: Findings, name: str) -> list[Option]:
    """Return what a cell of an environment could hold."""
    site = findings.sites[name]
    arms = [(who, epsilon) for where, who, epsilon in findings.arms if where == name]
    old, last = _contiguous(site.replicates), site.replicates[-1]
    new = tuple(range(last + 1, last + 1 + NEW_REPLICATES))
    options = []
    for places, where in ((old, "the same env_seeds"), (new, "new env_seeds")):
        for fields, why in _fields(arms, fresh=places == new):
            options.append(Option(environment=name, fields=fields, replicates=places, why=f"{why} on {where}"))
    twins = findings.twins.get(name, ())
    if twins:
        behaviours, epsilons = tuple(who for who, _ in twins), tuple(sorted({epsilon for _, epsilon in twins}))
        fields = {"behaviours": behaviours, "epsilons": epsilons}
        told = "coinciding behaviours"
        options.append(Option(environment=name, fields=fields, replicates=new, why=f"{told} on new env_seeds"))
        fields = {"behaviours": (*behaviours, "random"), "epsilons": epsilons, "explorers": EXPLORERS[0]}
        told += f", random and {EXPLORERS[0]} explorers"
        options.append(Option(environment=name, fields=fields, replicates=new, why=f"{told} on new env_seeds"))
    return options


def _fields(arms: Sequence[tuple[str, float]], *, fresh: bool) -> Iterator[tuple[dict[str, object], str]]:
    """What a cell could hold on env_seeds that the dataset has, or on fresh ones, and that in words."""
    rules = tuple(who for who in ELEVEN_BEHAVIOURS if who != "random" and any(who == held for held, _ in arms))
    missing = tuple(who for who in ELEVEN_BEHAVIOURS if all(who != held for held, _ in arms))
    greedy: dict[str, object] = {"behaviours": ("random",), "epsilons": (0.0,)}
    for repetitions in (1,) if fresh or "random" in missing else (2, 4):
        yield {**greedy, "repetitions": repetitions}, "random"
    for epsilon in EXPLORING:
        if rules and (fresh or all(epsilon != held for _, held in arms)):
            yield {"behaviours": rules, "epsilons": (epsilon,)}, f"the rules with epsilon {epsilon}"
    if missing:
        yield {"behaviours": missing, "epsilons": (0.0, 0.2)}, "behaviours that are missing"
    if fresh or all(who != "schedule-sampler" for who, _ in arms):
        for count in EXPLORERS:
            yield {**greedy, "explorers": count}, f"random and {count} explorers"


def _contiguous(replicates: tuple[int, ...]) -> tuple[int, ...]:
    """The longest run of replicates without a gap that begins with the first."""
    first = replicates[0]
    return tuple(replicate for place, replicate in enumerate(replicates) if replicate == first + place)
