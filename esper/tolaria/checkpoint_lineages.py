"""Lineages and flocks in a checkpoint: modules are rebuilt from their recipe, then given their weights.

A network's recipe is its root's environment; a seed's is its key. Optimisers refer to weights by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from esper.kasmina.lifecycle import SeedKey
from esper.kasmina.network import Graft
from esper.leyline.errors import IntegrityError
from esper.leyline.identity import Root
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.checkpoint_parts import Json, Packer, Unpacker
from esper.tolaria.cost import HostCosts
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import Incubation, Lineage, make_optimiser, new_gate, new_network, new_seed
from esper.tolaria.roots import root_environment
from esper.tolaria.tasks import TaskData
from esper.tolaria.transitions import Flock

_REBUILT = ("spec", "network", "optimiser", "incubations")
"""Attributes of a lineage that are not plain values."""


def pack_flock(flock: Flock, packer: Packer) -> Json:
    """Return a flock as JSON: every lineage that it or a rider holds, and the riders."""
    lineages = list(flock.lineages.values())
    for rider in flock.riders:
        if not any(rider.lineage is lineage for lineage in lineages):
            lineages.append(rider.lineage)  # of an episode that has ended: its last state is still observed
    index = {id(lineage): place for place, lineage in enumerate(lineages)}
    roots = {id(rider.lineage): rider.root for rider in flock.riders}
    return {
        "step": flock.step,
        "trunk_key": flock.trunk_key,
        "num_live": len(flock.lineages),
        "lineages": [_pack_lineage(each, roots.get(id(each), Root.HOST.value), packer) for each in lineages],
        "riders": [_pack_rider(rider, index[id(rider.lineage)], packer) for rider in flock.riders],
    }


def unpack_flock(
    stored: Json, unpacker: Unpacker, spec: EnvironmentSpec, env_seed: int, costs: dict[str, HostCosts], data: TaskData
) -> Flock:
    """Return a flock that goes on as the stored one would have.

    Args:
        stored: What `pack_flock` returned.
        unpacker: Reads its values.
        spec: The environment.
        env_seed: The environment seed.
        costs: Costs of each root's host.
        data: The task.
    """
    environments = {root: root_environment(spec, root) for root in costs}
    lineages = [
        _unpack_lineage(each, unpacker, environments[each["root"]], env_seed, data) for each in stored["lineages"]
    ]
    riders = [
        Rider(lineage=lineages[each["lineage"]], **{name: unpacker.unpack(v) for name, v in each["fields"].items()})
        for each in stored["riders"]
    ]
    return Flock(
        spec=spec,
        env_seed=env_seed,
        costs=costs,
        step=stored["step"],
        trunk_key=stored["trunk_key"],
        lineages={lineage.host_key: lineage for lineage in lineages[: stored["num_live"]]},
        riders=riders,
    )


def _pack_rider(rider: Rider, lineage: int, packer: Packer) -> Json:
    names = [field.name for field in dataclasses.fields(rider) if field.name != "lineage"]
    return {"lineage": lineage, "fields": {name: packer.pack(getattr(rider, name)) for name in names}}


def _pack_lineage(lineage: Lineage, root: str, packer: Packer) -> Json:
    names = {id(weight): name for name, weight in _weights(lineage)}
    return {
        "root": root,
        "plain": {name: packer.pack(value) for name, value in vars(lineage).items() if name not in _REBUILT},
        "host": packer.pack_module(lineage.network.host),
        "grafts": [[slot, _pack_graft(graft, packer)] for slot, graft in lineage.network.grafts.items()],
        "optimiser": packer.pack_optimiser(lineage.optimiser, names),
        "incubations": [_pack_incubation(incubation, packer) for incubation in lineage.incubations.values()],
    }


def _unpack_lineage(stored: Json, unpacker: Unpacker, spec: EnvironmentSpec, env_seed: int, data: TaskData) -> Lineage:
    plain = {name: unpacker.unpack(value) for name, value in stored["plain"].items()}
    lineage = Lineage(plain["host_key"], spec, new_network(spec, env_seed, data))
    if set(plain) != set(vars(lineage)) - set(_REBUILT):
        missing = sorted(set(plain) ^ (set(vars(lineage)) - set(_REBUILT)))
        raise IntegrityError(f"the checkpoint's lineages have other attributes than this version's: {missing}")
    for name, value in plain.items():
        setattr(lineage, name, value)
    unpacker.load_module(lineage.network.host, stored["host"])
    for slot, graft in stored["grafts"]:
        lineage.network.grafts[slot] = _unpack_graft(graft, unpacker, lineage, lineage.seeds[slot].key, env_seed)
    lineage.incubations = {}
    for each in stored["incubations"]:
        incubation = _unpack_incubation(each, unpacker, lineage, env_seed)
        lineage.incubations[incubation.key] = incubation
    unpacker.load_optimiser(lineage.optimiser, stored["optimiser"], dict(_weights(lineage)))
    return lineage


def _weights(lineage: Lineage) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of everything that the lineage's own optimiser may hold."""
    for name, weight in lineage.network.host.named_parameters():
        yield f"host.{name}", weight
    for slot, graft in lineage.network.grafts.items():
        for part, module in (("module", graft.module), ("gate", graft.gate)):
            if module is not None:
                for name, weight in module.named_parameters():
                    yield f"graft{slot}.{part}.{name}", weight


def _pack_graft(graft: Graft, packer: Packer) -> Json:
    modules = {"module": graft.module, "gate": graft.gate}
    names = [field.name for field in dataclasses.fields(graft) if field.name not in modules]
    return {
        "fields": {name: packer.pack(getattr(graft, name)) for name in names},
        **{part: module and packer.pack_module(module) for part, module in modules.items()},
    }


def _unpack_graft(stored: Json, unpacker: Unpacker, lineage: Lineage, key: SeedKey, env_seed: int) -> Graft:
    channels = lineage.network.host.places[key.slot].channels
    module = new_seed(lineage.spec, key, env_seed, channels)
    unpacker.load_module(module, stored["module"])
    gate = None
    if stored["gate"] is not None:
        gate = new_gate(lineage.spec, key, env_seed, channels)
        unpacker.load_module(gate, stored["gate"])
    return Graft(module=module, gate=gate, **{name: unpacker.unpack(v) for name, v in stored["fields"].items()})


def _pack_incubation(incubation: Incubation, packer: Packer) -> Json:
    names = [f.name for f in dataclasses.fields(incubation) if f.name not in ("module", "optimiser", "weights")]
    weights = {id(weight): name for name, weight in incubation.module.named_parameters()}
    return {
        "fields": {name: packer.pack(getattr(incubation, name)) for name in names},
        "module": packer.pack_module(incubation.module),
        "optimiser": packer.pack_optimiser(incubation.optimiser, weights),
    }


def _unpack_incubation(stored: Json, unpacker: Unpacker, lineage: Lineage, env_seed: int) -> Incubation:
    fields = {name: unpacker.unpack(value) for name, value in stored["fields"].items()}
    key = fields["key"]
    module = new_seed(lineage.spec, key, env_seed, lineage.network.host.places[key.slot].channels)
    unpacker.load_module(module, stored["module"])
    optimiser = make_optimiser(lineage.spec, list(module.parameters()), 1.0)
    unpacker.load_optimiser(optimiser, stored["optimiser"], dict(module.named_parameters()))
    return Incubation(module=module, optimiser=optimiser, **fields)
