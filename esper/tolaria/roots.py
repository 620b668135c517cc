"""Roots: the network that an episode starts from. The root opens the host_key.

`host` is the environment's own; `bigger:BLUEPRINT` has that blueprint in every slot from epoch 0 (zero-initialised,
alpha = 1, committed); `wider:FACTOR` has every block's channels multiplied.
"""

from __future__ import annotations

from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import CNN_BLUEPRINTS, SEED_LR_FACTORS
from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.identity import Root, root_host_key
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import Stage
from esper.tolaria.executor import warm_start
from esper.tolaria.lineage import EpochMetrics, Lineage, new_network
from esper.tolaria.probes import validate
from esper.tolaria.tasks import TaskData


def root_environment(spec: EnvironmentSpec, root: str) -> EnvironmentSpec:
    """Return the environment with the root's host.

    Raises:
        SpecError: The root is not one of the three kinds, or its argument is wrong.
    """
    kind, _, argument = root.partition(":")
    if kind == Root.HOST and not argument:
        return spec
    if kind == Root.BIGGER:
        if argument not in CNN_BLUEPRINTS:
            raise unknown_name("blueprint", argument, CNN_BLUEPRINTS)
        return spec
    if kind == Root.WIDER:
        try:
            factor = float(argument)
        except ValueError:
            raise SpecError(f"root {root!r}: {argument!r} is not a number\n  expected: wider:FACTOR") from None
        host = spec.host.model_copy(update={"width_factor": spec.host.width_factor * factor})
        return spec.model_copy(update={"host": host})
    raise SpecError(f"unknown root {root!r}\n  expected: host, bigger:BLUEPRINT or wider:FACTOR")


def open_root(spec: EnvironmentSpec, env_seed: int, root: str, data: TaskData) -> tuple[Lineage, list[SlotState]]:
    """Return a root's lineage, trained for the warm start and validated, and the slots that a rider starts with."""
    own = root_environment(spec, root)
    lineage = Lineage(root_host_key(spec.spec_id, env_seed, root), own, new_network(own, env_seed, data))
    slots = [SlotState() for _ in range(own.host.num_slots)]
    kind, _, argument = root.partition(":")
    if kind == Root.BIGGER:
        blueprint = CNN_BLUEPRINTS.index(argument)
        for index, place in enumerate(lineage.network.host.places):
            key = SeedKey(index, blueprint, SEED_LR_FACTORS.index(1.0), 0, own.incubation)
            lineage.plant_fossil(key, env_seed, place.channels)
            slots[index] = SlotState(stage=Stage.FOSSILIZED, seed=key, blend=0, tempo=0, dwell=0, isolation=1)
    warm_start(lineage, data, env_seed)
    metrics = EpochMetrics()
    validate(lineage, data, metrics)
    lineage.record(metrics)
    return lineage, slots
