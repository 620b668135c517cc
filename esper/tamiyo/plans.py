"""Plans: lists of plants. The declared ones, and sampled ones keyed by (pool, index) alone."""

from __future__ import annotations

from typing import Literal

import numpy as np

from esper.leyline.actions import (
    BLENDS,
    DWELL_EPOCHS,
    ISOLATIONS,
    SEED_LR_FACTORS,
    TEMPO_EPOCHS,
    Action,
    Actions,
    Bools,
    Isolation,
    Op,
)
from esper.leyline.blueprint_names import blueprint_code, counterpart
from esper.leyline.controller_specs import FixedSchedule, Plant, ScheduleSampler
from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.specs import EnvironmentSpec

Plan = tuple[Plant, ...]

DECLARED_BLUEPRINTS = ("conv_light", "conv_heavy")
"""On a transformer their counterparts."""
DECLARED_EPOCHS = (0, 2)
MAX_SAMPLED_SEEDS = 3
_DRAWS_PER_SEED = 7


def declared_plans(num_slots: int, environment: EnvironmentSpec) -> list[Plan]:
    """Return the plans that every pool begins with: light and heavy, in each slot and in all, at epochs 0 and 2.

    Args:
        num_slots: How many of the slots that may be used, from the first on.
        environment: Where the plans are carried out.
    """
    usable = _usable_slots(environment)[:num_slots]
    places: list[tuple[int, ...]] = [(slot,) for slot in usable]
    if num_slots > 1:
        places.append(usable)
    blueprints = [counterpart(name, environment.host.topology) for name in DECLARED_BLUEPRINTS]
    return [
        tuple(Plant(slot=slot, blueprint=blueprint, birth_epoch=epoch) for slot in slots)
        for epoch in DECLARED_EPOCHS
        for slots in places
        for blueprint in blueprints
    ]


def _usable_slots(environment: EnvironmentSpec) -> tuple[int, ...]:
    return tuple(np.flatnonzero(environment.enabled_slots).tolist())


def pool_plan(sampler: ScheduleSampler, index: int, environment: EnvironmentSpec) -> Plan:
    """Return plan `index` of a sampler's pool.

    It depends on the pool's name, the index and what the environment offers, and on no environment seed.

    Raises:
        SpecError: The pool has no such plan, or plans for more slots than may be used.
    """
    usable = int(environment.enabled_slots.sum())
    if sampler.num_slots > usable:
        raise SpecError(
            f"pool {sampler.pool!r} plans for {sampler.num_slots} slots\n"
            f"  expected: at most the {usable} of {environment.name!r}"
        )
    if not 0 <= index < sampler.num_plans:
        raise SpecError(f"plan {index} of pool {sampler.pool!r}\n  expected: 0 to {sampler.num_plans - 1}")
    declared = declared_plans(sampler.num_slots, environment)
    if index < len(declared):
        return declared[index]
    return _sampled_plan(sampler, index, environment)


def pool_plans(sampler: ScheduleSampler, environment: EnvironmentSpec) -> list[FixedSchedule]:
    """Return the whole pool as fixed schedules named `plan-0`, `plan-1`, ..."""
    return [
        FixedSchedule(name=f"plan-{index}", plants=pool_plan(sampler, index, environment))
        for index in range(sampler.num_plans)
    ]


def _sampled_plan(sampler: ScheduleSampler, index: int, environment: EnvironmentSpec) -> Plan:
    generator = numpy_generator("plan", sampler.pool, index)
    # A fixed number of draws: what one lever offers never moves the draws of another.
    count = 1 + int(generator.random() * min(MAX_SAMPLED_SEEDS, sampler.num_slots))
    places = np.argsort(generator.random(sampler.num_slots))[:count]
    draws = generator.random((MAX_SAMPLED_SEEDS, _DRAWS_PER_SEED))
    masks = environment.lever_masks()
    usable = _usable_slots(environment)
    plants = []
    for place, (birth, *levers) in zip(places, draws):
        chosen = [_pick(mask, draw) for mask, draw in zip(masks, levers)]
        plants.append(
            Plant(
                slot=usable[place],
                blueprint=environment.blueprints[chosen[0]],
                birth_epoch=int(birth * (sampler.max_birth_epoch + 1)),
                blend=BLENDS[chosen[1]],
                tempo_epochs=TEMPO_EPOCHS[chosen[2]],
                dwell_epochs=DWELL_EPOCHS[chosen[3]],
                isolation=_isolation_word(ISOLATIONS[chosen[4]]),
                seed_lr_factor=SEED_LR_FACTORS[chosen[5]],
            )
        )
    return tuple(plants)


def _pick(mask: Bools, draw: float) -> int:
    offered = np.flatnonzero(mask)
    return int(offered[int(draw * len(offered))])


def _isolation_word(isolation: Isolation) -> Literal["isolated", "coadapt"]:
    return "isolated" if isolation is Isolation.ISOLATED else "coadapt"


def plant_row(plant: Plant, environment: EnvironmentSpec) -> Actions:
    """Return the GERMINATE that carries out a plant, int8 [8].

    A lever value that the environment does not offer becomes the nearest one that it does.

    Raises:
        SpecError: The host has no such slot, or it may not be used.
        UnknownNameError: The host has no such blueprint.
    """
    usable = _usable_slots(environment)
    if plant.slot not in usable:
        raise SpecError(
            f"a plant in slot {plant.slot} of environment {environment.name!r}\n"
            f"  expected: one of the slots {', '.join(str(slot) for slot in usable)}"
        )
    by_topology = plant.isolation == "topology"
    row = Action(
        op=Op.GERMINATE,
        slot=plant.slot,
        blueprint=blueprint_code(plant.blueprint, environment.host.topology),
        blend=plant.blend,
        tempo_epochs=plant.tempo_epochs,
        dwell_epochs=plant.dwell_epochs,
        isolation=environment.isolation if by_topology else Isolation(plant.isolation),
        seed_lr_factor=plant.seed_lr_factor,
    ).to_row()
    for lever, mask in enumerate(environment.lever_masks()):
        offered = np.flatnonzero(mask)
        row[2 + lever] = offered[np.abs(offered - int(row[2 + lever])).argmin()]
    return row
