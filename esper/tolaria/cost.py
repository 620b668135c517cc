"""What an epoch costs: parameters and floating-point operations, counted once per host and blueprint.

Operations are twice the multiply-adds of convolutions and matrix products, those of attention among them, as torch's
counter gives them; looking up embeddings is free. A training pass is counted forward and backward: it adds one forward
for the weight gradients (not of frozen layers) and one for the input gradients (not of the first layer). An incubating
seed costs three forwards of its own, one where its weights stand still, and an own pass two of the suffix besides.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.gating import build_gate
from esper.kasmina.hosts import DataShape, SlotPlace, build_host, count_parameters
from esper.kasmina.lifecycle import SeedKey
from esper.leyline.actions import Blend
from esper.leyline.errors import SpecError
from esper.leyline.host_specs import BLUEPRINTS, HostSpec, Topology, TransformerHost
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.incubation import learns_in
from esper.tolaria.lineage import Lineage
from esper.tolaria.tasks import load_task

_PROBE_ROWS = 2
_MOST_WIDENING = 64


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Forward operations per row of each segment and the head, the training total, places and parameters."""

    forward_by_segment: tuple[float, ...]
    head_forward: float
    train_per_sample: float
    places: tuple[SlotPlace, ...]
    num_params: int


@dataclass(frozen=True, slots=True)
class BlueprintCosts:
    """Forward operations per row, parameters, and whether shape is kept (what G1 asks)."""

    forward: float
    num_params: int
    keeps_shape: bool


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count operations; attention as its two matrix products, since the counter does not know the CPU's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _forward_flops(module: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    with torch.no_grad(), _counting() as counter:
        out = module(x)
    return counter.get_total_flops() / len(x), out


def _probe_batch(shape: DataShape) -> Tensor:
    if shape.kind == "text":
        return torch.zeros(_PROBE_ROWS, shape.resolution, dtype=torch.int64)
    return torch.zeros(_PROBE_ROWS, shape.channels, shape.resolution, shape.resolution)


def _activation(topology: Topology, channels: int, resolution: int) -> Tensor:
    if topology == "transformer":
        return torch.zeros(_PROBE_ROWS, resolution, channels)
    return torch.zeros(_PROBE_ROWS, channels, resolution, resolution)


@lru_cache(maxsize=256)
def host_costs(spec: HostSpec, shape: DataShape) -> HostCosts:
    """Return the costs of a bare host."""
    # tensors without data: shapes alone decide the count, and a host of any size is counted in a moment
    with torch.device("meta"):
        host = build_host(spec, shape)
        h = x = _probe_batch(shape)
    totals = [0]
    with _counting() as counter:
        for segment in host.segments:
            h = segment(h)
            totals.append(counter.get_total_flops())
        logits = host.classify(h)
        totals.append(counter.get_total_flops())
        logits.sum().backward()  # type: ignore[no-untyped-call]
    *forwards, head = ((after - before) / len(x) for before, after in itertools.pairwise(totals))
    training = counter.get_total_flops() / len(x)
    return HostCosts(tuple(forwards), head, training, host.places, count_parameters(host))


@lru_cache(maxsize=512)
def blueprint_costs(topology: Topology, blueprint: int, channels: int, resolution: int) -> BlueprintCosts:
    """Return the costs of a blueprint in a slot of that many channels and pixels (transformer: width and tokens)."""
    with torch.random.fork_rng(devices=[]):
        module = build_blueprint(topology, BLUEPRINTS[topology][blueprint], channels)
    x = _activation(topology, channels, resolution)
    flops, out = _forward_flops(module, x)
    return BlueprintCosts(flops, count_parameters(module), out.shape == x.shape)


def environment_costs(spec: EnvironmentSpec) -> HostCosts:
    """Return the costs of an environment's host."""
    data = load_task(spec.task)
    return host_costs(spec.host, data.shape)


def _suffix_flops(costs: HostCosts, slot: int) -> float:
    return sum(costs.forward_by_segment[slot + 1 :]) + costs.head_forward


@lru_cache(maxsize=64)
def _gate_flops(topology: Topology, channels: int, resolution: int) -> float:
    with torch.device("meta"):
        return _forward_flops(build_gate(topology, channels), _activation(topology, channels, resolution))[0]


def lineage_epoch_flops(lineage: Lineage, costs: HostCosts) -> tuple[float, dict[SeedKey, float]]:
    """Return the training operations of the epoch that has just run: host with blended seeds, and per incubation.

    What is computed counts, wanted or not: an epoch in which the environment holds the host still costs the same.
    """
    samples = lineage.spec.batch_size * lineage.spec.batches_per_epoch
    topology = lineage.spec.host.topology

    def seed_forward(slot: int, blueprint: int, gated: bool = False) -> float:
        place = costs.places[slot]
        gate = _gate_flops(topology, place.channels, place.resolution) if gated else 0.0
        return gate + blueprint_costs(topology, blueprint, place.channels, place.resolution).forward

    grafted = {
        slot: seed_forward(slot, seed.key.blueprint, seed.blend is Blend.GATED) for slot, seed in lineage.seeds.items()
    }
    host = costs.train_per_sample + 3 * sum(grafted.values())
    epoch = len(lineage.history) - 2
    own = {}
    for key, incubation in lineage.incubations.items():
        if not key.has_started:
            own[key] = 0.0
            continue
        passes = 3 if learns_in(incubation, epoch) else 1
        suffix = 0.0
        if key.incubation == "own_pass":
            suffix = _suffix_flops(costs, key.slot) + sum(flops for slot, flops in grafted.items() if slot > key.slot)
        own[key] = samples * (passes * seed_forward(key.slot, key.blueprint) + 2 * suffix)
    return samples * host, own


def wider_factor(environment: EnvironmentSpec, train_flops_per_epoch: float) -> float:
    """Return the smallest width factor (1 or more) whose host costs at least that many operations an epoch.

    Factors go in steps of 1/32; those of a transformer in steps of one channel for each head.

    Raises:
        SpecError: No factor up to 64 reaches the target.
    """
    samples = environment.batch_size * environment.batches_per_epoch
    data = load_task(environment.task)
    host = environment.host

    def flops_at(factor: float) -> float:
        wider = host.model_copy(update={"width_factor": host.width_factor * factor})
        return host_costs(wider, data.shape).train_per_sample * samples

    factors = _width_factors(host)
    position = bisect_left(factors, train_flops_per_epoch, key=flops_at)
    if position == len(factors):
        raise SpecError(
            f"no width factor up to {_MOST_WIDENING} costs {train_flops_per_epoch:.3g} operations an epoch on "
            f"{environment.name!r}"
        )
    return factors[position]


def _width_factors(host: HostSpec) -> list[float]:
    """The factors that make a host wider, from 1 to 64, rising."""
    if isinstance(host, TransformerHost):
        per_head = host.embed * host.width_factor / host.heads
        wider = [width / per_head for width in range(int(per_head) + 1, int(per_head * _MOST_WIDENING) + 1)]
        return [1.0, *wider]
    return [step / 32 for step in range(32, 32 * _MOST_WIDENING + 1)]
