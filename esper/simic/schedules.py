"""The fixed schedules among which the best one is chosen: the bar that takes nearly all of what growth can win."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from esper.leyline.actions import Blend
from esper.leyline.blueprint_names import counterpart
from esper.leyline.controller_specs import FixedSchedule, Plant
from esper.leyline.errors import SpecError
from esper.leyline.specs import EnvironmentSpec

MAX_CANDIDATES = 16
"""Each costs an episode per selection seed: a digits-gap cohort of 16 takes 20 to 30 CPU-seconds."""

STRONG = ("conv_heavy", "conv_light")
PAYING = (*STRONG, "depthwise", "bottleneck")
"""The blueprints whose single seeds gained more than noise on the impaired hosts; the others never did.

On a transformer their counterparts."""

Site = tuple[str, int, int]
"""Blueprint, slot, birth epoch."""


def candidate_schedules(environment: EnvironmentSpec, *, limit: int = MAX_CANDIDATES) -> tuple[FixedSchedule, ...]:
    """Return the candidates, most promising first, at most `limit`.

    Singles of the paying blueprints in every slot born at epoch 0 or 2, and the strong ones in pairs of slots and in
    all slots at epoch 0. No candidate plants more seeds than `max_seeds` and `max_fossils` allow; never acting is not
    a candidate, it is the control.

    Raises:
        SpecError: The environment allows no seed at all.
    """
    slots = np.flatnonzero(environment.enabled_slots).tolist()
    cap = min(environment.seeds_cap, environment.fossils_cap, len(slots))
    if cap < 1:
        raise SpecError(
            f"environment {environment.name!r} allows no committed seed: there is no fixed schedule\n"
            f"  found: max_seeds {environment.seeds_cap}, max_fossils {environment.fossils_cap}\n"
            "  expected: at least one of each"
        )
    chosen: dict[tuple[Site, ...], FixedSchedule] = {}
    for named in _site_lists(slots):
        sites = tuple((counterpart(name, environment.host.topology), slot, birth) for name, slot, birth in named)
        if len(sites) <= cap and sites not in chosen and len(chosen) < limit:
            chosen[sites] = _schedule(sites, environment)
    return tuple(chosen.values())


def describe(schedule: FixedSchedule) -> str:
    """Return a schedule in words, for tables; a blend of the usual length is not mentioned."""
    kinds = {(plant.blueprint, plant.birth_epoch, plant.tempo_epochs) for plant in schedule.plants}
    if len(kinds) == 1:
        slots = ", ".join(str(plant.slot) for plant in schedule.plants)
        return _planted(schedule.plants[0], f"{'slot' if len(schedule.plants) == 1 else 'slots'} {slots}")
    return "; ".join(_planted(plant, f"slot {plant.slot}") for plant in schedule.plants)


def _planted(plant: Plant, where: str) -> str:
    usual = plant.tempo_epochs == Plant.model_fields["tempo_epochs"].default
    blended = "" if usual else f", blended over {plant.tempo_epochs} epochs"
    return f"{plant.blueprint} in {where} at epoch {plant.birth_epoch}{blended}"


def _site_lists(slots: Sequence[int]) -> Iterator[tuple[Site, ...]]:
    """All candidates in order of promise: where a limit cuts, it cuts what the measurements say matters least."""
    yield from (((blueprint, slot, 0),) for blueprint in STRONG for slot in slots)
    yield from (tuple((blueprint, slot, 0) for slot in slots) for blueprint in STRONG)
    for blueprint in STRONG:
        for pair in combinations(slots, 2):
            yield tuple((blueprint, slot, 0) for slot in pair)
    yield from (((blueprint, slot, 2),) for blueprint in STRONG for slot in slots)
    for birth in (0, 2):
        yield from (((blueprint, slot, birth),) for blueprint in PAYING for slot in slots)


def _schedule(sites: tuple[Site, ...], environment: EnvironmentSpec) -> FixedSchedule:
    """The plants of the sites, with the quickest levers that the environment offers."""
    plants = tuple(
        Plant(
            slot=slot,
            blueprint=blueprint,
            birth_epoch=birth,
            blend=Blend.LINEAR if Blend.LINEAR in environment.blends else environment.blends[0],
            tempo_epochs=min(environment.tempos),
            dwell_epochs=min(environment.dwells),
            seed_lr_factor=1.0 if 1.0 in environment.seed_lr_factors else environment.seed_lr_factors[0],
        )
        for blueprint, slot, birth in sites
    )
    slots = "+".join(str(slot) for _, slot, _ in sites)
    return FixedSchedule(name=f"{sites[0][0]}-s{slots}-e{sites[0][2]}", plants=plants)
