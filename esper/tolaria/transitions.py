"""What actions do to a cohort: gates, forks at host-changing events, quiet changes, seeds held too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from esper.kasmina import lifecycle
from esper.kasmina.gates import GateReport, gate_g1, gate_g2, gate_g3, gate_g5
from esper.kasmina.gating import gate_params
from esper.kasmina.lifecycle import NOT_STARTED, SeedKey
from esper.leyline.actions import BLENDS, WAIT_ROW, Blend, Bools, Op
from esper.leyline.identity import Root, extend_host_key
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import BLENDED_STAGES, Stage
from esper.tolaria.cost import HostCosts, blueprint_costs
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import Lineage, SeedMeasures

Event = tuple[str | int | float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of the actions of one step: carried out, or refused and by which check."""

    executed_K: Bools
    refused_by: list[str | None]


@dataclass(slots=True, kw_only=True)
class Flock:
    """The riders of a cohort and the lineages that they ride, after `step` epochs.

    Attributes:
        spec: The environment.
        env_seed: The environment seed.
        costs: Costs of each root's host.
        step: Epochs run.
        trunk_key: The never-act lineage.
        lineages: Every lineage, by host_key.
        riders: Every episode, in order.
    """

    spec: EnvironmentSpec
    env_seed: int
    costs: dict[str, HostCosts]
    step: int
    trunk_key: str
    lineages: dict[str, Lineage]
    riders: list[Rider]

    @property
    def trunk(self) -> Lineage:
        """The never-act trajectory."""
        return self.lineages[self.trunk_key]


def apply_actions(flock: Flock, actions_KA: NDArray[np.integer], valid_K: Bools) -> Applied:
    """Carry out one action per rider, int [K, 8]; an invalid one, or one that a gate refuses, leaves it as it is."""
    executed = np.zeros(len(flock.riders), dtype=bool)
    refused: list[str | None] = [None] * len(flock.riders)
    movers: dict[tuple[str, Event], list[tuple[Rider, int]]] = {}
    for rider, row, valid in zip(flock.riders, actions_KA, valid_K):
        if rider.done:
            continue
        report = _gate(flock, rider, row) if valid else GateReport("mask", (), ("invalid_action",))
        executed[rider.index] = report.is_open
        refused[rider.index] = None if report.is_open else f"{report.gate}:{','.join(report.failed)}"
        event = _event(flock, rider, row) if report.is_open else None
        if event is not None:
            movers.setdefault((rider.lineage.host_key, event), []).append((rider, int(row[1])))
        elif report.is_open:
            _quiet(flock, rider, row)
        rider.last_op = int(row[0])
        rider.last_executed = bool(report.is_open)
        rider.submitted_rows.append(tuple(int(v) for v in row))
        rider.executed_rows.append(tuple(int(v) for v in (row if report.is_open else WAIT_ROW)))
    drop_unused(flock)
    for (parent_key, event), moved in movers.items():
        _fork(flock, parent_key, event, moved)
        drop_unused(flock)  # at once: however many episodes fork, there is never more than one lineage too many
    return Applied(executed_K=executed, refused_by=refused)


def _gate(flock: Flock, rider: Rider, row: NDArray[np.integer]) -> GateReport:
    """Ask the gate that an action goes through; WAIT and PRUNE have none."""
    op, index = Op(int(row[0])), int(row[1])
    slot, lineage = rider.slots[index], rider.lineage
    strict = flock.spec.gates == "strict"
    if op is Op.GERMINATE:
        gate = _gate_params(flock, rider, index) if BLENDS[int(row[3])] is Blend.GATED else 0
        return _ask_g1(flock, rider, index, int(row[2]), rider.seed_params() + gate)
    if op is Op.ADVANCE and slot.stage is Stage.GERMINATED and slot.seed is not None:
        return _ask_g1(flock, rider, index, slot.seed.blueprint, rider.seed_params())
    if op is Op.ADVANCE and slot.stage is Stage.BLENDING:
        return gate_g3(slot, alpha=lineage.network.grafts[index].alpha)
    if op is Op.ADVANCE:
        incubation = lineage.incubations.get(slot.seed) if slot.seed is not None else None
        measures = incubation.measures if incubation is not None else SeedMeasures()
        module = incubation.module if incubation is not None else None
        return gate_g2(
            slot,
            weights_finite=module is not None and all(bool(torch.isfinite(p).all()) for p in module.parameters()),
            strict=strict,
            seed_improvement=measures.seed_improvement,
            gradient_vanishing=measures.gradient_vanishing,
            gradient_ratio=measures.gradient_ratio,
        )
    if op is Op.FOSSILIZE:
        seed = lineage.seeds.get(index)
        cost = seed.measures.removal_cost if seed is not None else SeedMeasures().removal_cost
        return gate_g5(slot, strict=strict, removal_cost=cost)
    return GateReport("none", (), ())


def _ask_g1(flock: Flock, rider: Rider, index: int, blueprint: int, params_so_far: int) -> GateReport:
    """Ask whether a blueprint may train in a slot; a seed that waits there is among `params_so_far`."""
    slot, budget = rider.slots[index], flock.spec.param_budget
    host = flock.costs[rider.root]
    place = host.places[index]
    costs = blueprint_costs(flock.spec.host.topology, blueprint, place.channels, place.resolution)
    # Another width counts as it does in the rows, and so in the masks: against the environment's own host.
    wider = host.num_params - flock.costs[Root.HOST].num_params
    total = params_so_far + wider + (costs.num_params if slot.stage is Stage.DORMANT else 0)
    return gate_g1(slot, shape_kept=costs.keeps_shape, within_budget=budget is None or total <= budget)


def _gate_params(flock: Flock, rider: Rider, index: int) -> int:
    return gate_params(flock.costs[rider.root].places[index].channels)


def _event(flock: Flock, rider: Rider, row: NDArray[np.integer]) -> Event | None:
    """The host-changing event that an action is, or None."""
    op, index = Op(int(row[0])), int(row[1])
    if op in (Op.WAIT, Op.GERMINATE):
        return None
    slot = rider.slots[index]
    if op is Op.ADVANCE:
        if slot.stage is not Stage.TRAINING or slot.seed is None:
            return None
        return ("blend", flock.step, *slot.seed.parts(), slot.blend, slot.tempo, slot.isolation)
    if op is Op.FOSSILIZE:
        return ("fossilize", flock.step, index)
    return ("prune", flock.step, index) if slot.stage in BLENDED_STAGES else None


def _quiet(flock: Flock, rider: Rider, row: NDArray[np.integer]) -> None:
    """Carry out an action that leaves the host alone."""
    op, index = Op(int(row[0])), int(row[1])
    slot, accuracy = rider.slots[index], rider.lineage.history[-1].val_accuracy
    if op is Op.GERMINATE:
        start = NOT_STARTED if flock.spec.ask_at_every_gate else flock.step
        seed = SeedKey(index, int(row[2]), int(row[7]), flock.step, flock.spec.incubation, start)
        levers = (int(row[3]), int(row[4]), int(row[5]), int(row[6]))
        rider.slots[index] = lifecycle.germinate(slot, seed, levers, accuracy)
        _incubate(flock, rider, index)
    elif op is Op.ADVANCE and slot.stage is Stage.GERMINATED:
        rider.slots[index] = lifecycle.start(slot, flock.step, accuracy)
        _incubate(flock, rider, index)
    elif op is Op.ADVANCE:
        rider.slots[index] = lifecycle.hold(slot, accuracy)
    elif op is Op.PRUNE:
        rider.slots[index] = lifecycle.prune(slot)


def _incubate(flock: Flock, rider: Rider, index: int) -> None:
    """See to it that the seed of a slot incubates on the rider's lineage."""
    seed = rider.slots[index].seed
    if seed is not None:
        rider.lineage.incubate(seed, flock.env_seed, flock.costs[rider.root].places[index].channels)


def _fork(flock: Flock, parent_key: str, event: Event, moved: list[tuple[Rider, int]]) -> None:
    """Move riders whose action is the same host-changing event onto a new lineage."""
    parent = flock.lineages[parent_key]
    keep = {key for rider, _ in moved for key in rider.incubating()}
    child = parent.fork(extend_host_key(parent_key, event), keep)
    flock.lineages[child.host_key] = child
    accuracy = parent.history[-1].val_accuracy
    first, index = moved[0]
    if event[0] == "blend":
        child.blend_in(first.slots[index], flock.env_seed)
    elif event[0] == "fossilize":
        child.commit(index)
    else:
        child.remove(index)
    for rider, slot in moved:
        rider.lineage = child
        state = rider.slots[slot]
        if event[0] == "blend":
            rider.slots[slot] = lifecycle.advance(state, accuracy)
        elif event[0] == "fossilize":
            rider.slots[slot] = lifecycle.fossilize(state, accuracy)
        else:
            rider.slots[slot] = lifecycle.prune(state)


def drop_unused(flock: Flock) -> None:
    """Forget lineages without running riders (never the trunk) and incubations that no rider has.

    A rider that has ended on a lineage that stays is still observed: its seeds stay too.
    """
    running = [rider.lineage.host_key for rider in flock.riders if not rider.done]
    needed: dict[str, set[SeedKey]] = {key: set() for key in (flock.trunk_key, *running)}
    for rider in flock.riders:
        if rider.lineage.host_key in needed:
            needed[rider.lineage.host_key].update(rider.incubating())
    known = flock.lineages.values()
    flock.lineages = {lineage.host_key: lineage for lineage in known if lineage.host_key in needed}
    for key, lineage in flock.lineages.items():
        lineage.incubations = {s: v for s, v in lineage.incubations.items() if s in needed[key]}


def expire_holding(flock: Flock) -> None:
    """Prune seeds that were held for as many decisions as the environment's patience: a host-changing event."""
    if flock.spec.holding_patience is None:
        return
    # A seed that was held by an ADVANCE has spent an epoch in the stage when it is first observed there.
    patience = flock.spec.holding_patience + flock.spec.ask_at_every_gate
    for index in range(flock.spec.host.num_slots):
        movers: dict[str, list[tuple[Rider, int]]] = {}
        for rider in flock.riders:
            state = rider.slots[index]
            if not rider.done and state.stage is Stage.HOLDING and state.epochs_in_stage >= patience:
                movers.setdefault(rider.lineage.host_key, []).append((rider, index))
        for parent_key, moved in movers.items():
            _fork(flock, parent_key, ("expire", flock.step, index), moved)
            drop_unused(flock)
    drop_unused(flock)
