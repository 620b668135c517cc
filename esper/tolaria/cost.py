"""What an epoch costs: parameters and floating-point operations, counted once per host and blueprint.

Operations are twice the multiply-adds of convolutions and matrix products, as torch's counter gives them for a forward
pass; a training pass adds one for the weight gradient (not of frozen layers) and one for the input gradient (not of
the first layer); the own pass of an incubating seed costs three forwards of the seed and two of the suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.hosts import ConvBlock, Host, SlotPlace, count_parameters
from esper.leyline.actions import CNN_BLUEPRINTS
from esper.leyline.errors import SpecError
from esper.leyline.specs import CnnHost, EnvironmentSpec
from esper.tolaria.lineage import Lineage
from esper.tolaria.tasks import load_task

_PROBE_ROWS = 2


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Forward operations per sample of each segment and the head, the training total, places and parameters."""

    forward_by_segment: tuple[float, ...]
    head_forward: float
    train_per_sample: float
    places: tuple[SlotPlace, ...]
    num_params: int


@dataclass(frozen=True, slots=True)
class BlueprintCosts:
    """Forward operations per sample, parameters, and whether shape is kept (what G1 asks)."""

    forward: float
    num_params: int
    keeps_shape: bool


def _forward_flops(module: nn.Module, x_BCHW: Tensor) -> tuple[float, Tensor]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(x_BCHW)
    return counter.get_total_flops() / len(x_BCHW), out


@lru_cache(maxsize=64)
def host_costs(spec: CnnHost, in_channels: int, resolution: int, num_classes: int) -> HostCosts:
    """Return the costs of a bare host."""
    with torch.random.fork_rng(devices=[]):
        host = Host(spec, in_channels, resolution, num_classes)
    host.eval()
    h_BCHW = torch.zeros(_PROBE_ROWS, in_channels, resolution, resolution)
    forwards: list[float] = []
    training = 0.0
    for index, block in enumerate(host.segments):
        flops, h_BCHW = _forward_flops(block, h_BCHW)
        forwards.append(flops)
        trained = isinstance(block, ConvBlock) and block.conv.weight.requires_grad
        training += flops * (1 + int(trained) + int(index > 0))
    head, _ = _forward_flops(host.head, h_BCHW.mean(dim=(2, 3)))
    return HostCosts(tuple(forwards), head, training + 3 * head, host.places, count_parameters(host))


@lru_cache(maxsize=512)
def blueprint_costs(blueprint: int, channels: int, resolution: int) -> BlueprintCosts:
    """Return the costs of a blueprint in a slot of that many channels and pixels."""
    with torch.random.fork_rng(devices=[]):
        module = build_blueprint(CNN_BLUEPRINTS[blueprint], channels)
    x_BCHW = torch.zeros(_PROBE_ROWS, channels, resolution, resolution)
    flops, out = _forward_flops(module, x_BCHW)
    return BlueprintCosts(flops, count_parameters(module), out.shape == x_BCHW.shape)


def environment_costs(spec: EnvironmentSpec) -> HostCosts:
    """Return the costs of an environment's host."""
    data = load_task(spec.task)
    return host_costs(spec.host, data.in_channels, data.resolution, data.num_classes)


def _suffix_flops(costs: HostCosts, slot: int) -> float:
    return sum(costs.forward_by_segment[slot + 1 :]) + costs.head_forward


def lineage_epoch_flops(lineage: Lineage, costs: HostCosts) -> tuple[float, dict[tuple[int, int], float]]:
    """Return the training operations of one epoch of a lineage: host with blended seeds, and per incubation.

    The second part is keyed by (slot, blueprint).
    """
    samples = lineage.spec.batch_size * lineage.spec.batches_per_epoch

    def seed_forward(slot: int, blueprint: int) -> float:
        place = costs.places[slot]
        return blueprint_costs(blueprint, place.channels, place.resolution).forward

    grafted = {slot: seed_forward(slot, seed.key.blueprint) for slot, seed in lineage.seeds.items()}
    host = costs.train_per_sample + 3 * sum(grafted.values())
    own = {}
    for key in lineage.incubations:
        later = sum(flops for slot, flops in grafted.items() if slot > key.slot)
        suffix = _suffix_flops(costs, key.slot) + later
        own[key.slot, key.blueprint] = samples * (3 * seed_forward(key.slot, key.blueprint) + 2 * suffix)
    return samples * host, own


def wider_factor(environment: EnvironmentSpec, train_flops_per_epoch: float) -> float:
    """Return the smallest width factor (steps of 1/32) whose host costs at least that many operations an epoch.

    Raises:
        SpecError: No factor up to 64 reaches the target.
    """
    samples = environment.batch_size * environment.batches_per_epoch
    data = load_task(environment.task)
    low, high = 32, 64 * 32
    while low < high:
        middle = (low + high) // 2
        host = environment.host.model_copy(update={"width_factor": environment.host.width_factor * middle / 32})
        costs = host_costs(host, data.in_channels, data.resolution, data.num_classes)
        if costs.train_per_sample * samples >= train_flops_per_epoch:
            high = middle
        else:
            low = middle + 1
    if low == 64 * 32:
        raise SpecError(
            f"no width factor up to 64 costs {train_flops_per_epoch:.3g} operations an epoch on {environment.name!r}"
        )
    return low / 32
