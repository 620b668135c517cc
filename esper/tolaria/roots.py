"""Roots: the network that an episode starts from. The root opens the host_key.

`host` is the environment's own; `bigger:BLUEPRINT` has that blueprint in every slot from the first epoch on
(zero-initialised, alpha = 1, committed), `bigger:BLUEPRINT@mid` in that slot alone; `ordinary:BLUEPRINT` is the same
without a zero at birth, as one builds a network that never grew; `grown:BLUEPRINT` is `bigger`, planted after the warm
start; `wider:FACTOR` has every block's channels multiplied.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from esper.kasmina.blueprints.cnn import SCALE_GAIN, ZeroScale
from esper.kasmina.blueprints.transformer import Norm as TextNorm
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import SEED_LR_FACTORS
from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.identity import Root, root_host_key
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import Stage
from esper.tolaria.executor import warm_start
from esper.tolaria.lineage import EpochMetrics, Lineage, new_network
from esper.tolaria.probes import validate
from esper.tolaria.runtime import keyed_initialisation
from esper.tolaria.tasks import TaskData


def root_environment(spec: EnvironmentSpec, root: str) -> EnvironmentSpec:
    """Return the environment with the root's host.

    Raises:
        SpecError: The root is not one of the five kinds, or its argument is wrong.
    """
    kind, _, argument = root.partition(":")
    if kind == Root.HOST and not argument:
        return spec
    if kind in (Root.BIGGER, Root.ORDINARY, Root.GROWN):
        _planted(spec, argument)
        return spec
    if kind == Root.WIDER:
        try:
            factor = float(argument)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            raise SpecError(
                f"root {root!r}: {argument!r} is not a positive number\n  expected: wider:FACTOR, as in wider:1.5"
            )
        host = spec.host.model_copy(update={"width_factor": spec.host.width_factor * factor})
        return spec.model_copy(update={"host": host})
    raise SpecError(f"unknown root {root!r}\n  expected: host, wider:FACTOR, or bigger, ordinary or grown:BLUEPRINT")


def _planted(spec: EnvironmentSpec, argument: str) -> tuple[int, tuple[int, ...]]:
    """Return the blueprint and the slots of `BLUEPRINT` or `BLUEPRINT@SLOT+SLOT`, as indices."""
    blueprint, _, where = argument.partition("@")
    if blueprint not in spec.blueprints:
        raise unknown_name("blueprint", blueprint, spec.blueprints)
    names = where.split("+") if where else [n for n, usable in zip(spec.slot_names, spec.enabled_slots) if usable]
    for name in names:
        if name not in spec.slot_names:
            raise unknown_name("slot", name, spec.slot_names)
    return spec.blueprints.index(blueprint), tuple(spec.slot_names.index(name) for name in names)


def open_root(spec: EnvironmentSpec, env_seed: int, root: str, data: TaskData) -> tuple[Lineage, list[SlotState]]:
    """Return a root's lineage, trained for the warm start and validated, and the slots that a rider starts with."""
    own = root_environment(spec, root)
    lineage = Lineage(root_host_key(spec.spec_id, env_seed, root), own, new_network(own, env_seed, data))
    slots = [SlotState() for _ in range(own.host.num_slots)]
    kind = root.partition(":")[0]
    if kind in (Root.BIGGER, Root.ORDINARY):
        _plant(lineage, slots, env_seed, root)
    warm_start(lineage, data, env_seed)
    if kind == Root.GROWN:
        _plant(lineage, slots, env_seed, root)
    metrics = EpochMetrics()
    validate(lineage, data, metrics)
    lineage.record(metrics)
    return lineage, slots


def _plant(lineage: Lineage, slots: list[SlotState], env_seed: int, root: str) -> None:
    """Commit the root's seeds and note them in the slots."""
    blueprint, planted = _planted(lineage.spec, root.partition(":")[2])
    for index in planted:
        key = SeedKey(index, blueprint, SEED_LR_FACTORS.index(1.0), 0, lineage.spec.incubation, 0)
        lineage.plant_fossil(key, env_seed, lineage.network.host.places[index].channels)
        if root.startswith(Root.ORDINARY):
            with keyed_initialisation(env_seed, "ordinary-init", index, blueprint):
                _without_zeros(lineage.network.grafts[index].module)
        slots[index] = SlotState(stage=Stage.FOSSILIZED, seed=key, blend=0, tempo=0, dwell=0, isolation=1)


@torch.no_grad()
def _without_zeros(module: nn.Module) -> None:
    """Give what is zero at birth its ordinary start: a scale 1, a convolution or a linear layer its own random one."""
    for part in module.modules():
        if isinstance(part, ZeroScale):
            part.weight.fill_(1.0 / SCALE_GAIN)
        elif isinstance(part, TextNorm):
            part.scale.fill_(1.0)
        elif isinstance(part, nn.Conv2d | nn.Conv1d | nn.Linear) and not part.weight.any():
            part.reset_parameters()
