"""A lineage: one distinct host trajectory, with the seeds that incubate on it. Riders share it, and it is run once."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.kasmina.blending import alpha_at
from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.gating import build_gate
from esper.kasmina.hosts import build_host, count_parameters
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.kasmina.network import Graft, Network
from esper.leyline.actions import SEED_LR_FACTORS, Blend
from esper.leyline.observations import CONTRIBUTION_PERCENTS
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.runtime import CPU, keyed_initialisation, lay_out
from esper.tolaria.tasks import TaskData

if TYPE_CHECKING:
    from esper.tolaria.governor import GoodState

NAN = float("nan")

MILESTONES = tuple(percent / 100 for percent in CONTRIBUTION_PERCENTS)
"""Shares of alpha at which a blended seed's removal cost is kept."""


@dataclass(slots=True)
class SeedMeasures:
    """What was measured of a seed in the last epoch; NaN is unmeasured. Losses in nats, accuracies in points."""

    train_loss_drop: float = NAN
    val_loss_drop: float = NAN
    seed_improvement: float = NAN
    removal_cost: float = NAN
    removal_cost_velocity: float = NAN
    gradient_norm: float = NAN
    gradient_health: float = NAN
    gradient_health_previous: float = NAN
    gradient_vanishing: float = NAN
    gradient_exploding: float = NAN
    gradient_ratio: float = NAN
    gradient_variation: float = NAN
    stable_share: float = NAN
    gradient_through_seed: float = NAN
    gradient_norms: list[float] = field(default_factory=list)
    """The gradient's norm in each of its epochs so far."""
    stable_epochs: int = 0
    weight_norm: float = NAN
    interaction_sum: float = NAN
    contributions: list[float] = field(default_factory=lambda: [NAN] * len(MILESTONES))


@dataclass(slots=True)
class Incubation:
    """A seed that trains beside the host. Its cost in CPU seconds is kept apart, to be shared by its own riders."""

    key: SeedKey
    module: nn.Module
    optimiser: torch.optim.Optimizer
    num_params: int
    measures: SeedMeasures = field(default_factory=SeedMeasures)
    cpu_s: float = 0.0
    weights: list[nn.Parameter] = field(init=False)
    """The module's parameters, listed once: a batch needs them three times."""

    def __post_init__(self) -> None:
        self.weights = list(self.module.parameters())


@dataclass(slots=True)
class BlendedSeed:
    """A seed that the host knows. Its parameters include its gate's."""

    key: SeedKey
    blend: Blend
    total_epochs: int
    num_params: int
    epochs_blended: int = 0
    measures: SeedMeasures = field(default_factory=SeedMeasures)


@dataclass(slots=True)
class EpochMetrics:
    """Host losses (nats) and accuracies (fractions) after an epoch; NaN is unmeasured."""

    train_loss: float = NAN
    train_accuracy: float = NAN
    val_loss: float = NAN
    val_accuracy: float = NAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Accuracies at the end of an episode, fractions."""

    final_val_accuracy: float
    final_test_accuracy: float
    uncommitted_val_accuracy: float
    uncommitted_test_accuracy: float
    seed_params: int
    num_fossils: int
    shapley: tuple[float, ...] | None = None
    """Per slot in points, NaN for a slot without a blended seed; None where it was not measured."""


class Lineage:
    """The state of one host trajectory."""

    def __init__(self, host_key: str, spec: EnvironmentSpec, network: Network) -> None:
        self.host_key = host_key
        self.spec = spec
        self.network = network
        self.optimiser = make_optimiser(spec, [p for p in network.parameters() if p.requires_grad], 1.0)
        self.seeds: dict[int, BlendedSeed] = {}
        self.incubations: dict[SeedKey, Incubation] = {}
        self.history: list[EpochMetrics] = []
        self.plateau_epochs = 0
        self.non_finite = False
        self.diverged = False
        self.num_rollbacks = 0
        self.lr_scale = 1.0
        self.peak_train_accuracy = 0.0
        self.good: GoodState | None = None
        self.host_weight_change = NAN
        self.removal_cost_all = NAN
        self.cpu_s = 0.0
        self.outcome: Outcome | None = None

    def fork(self, host_key: str, keep: set[SeedKey]) -> Lineage:
        """Return a copy under a new key, with the incubations in `keep`."""
        incubations, self.incubations = self.incubations, {k: v for k, v in self.incubations.items() if k in keep}
        child = copy.deepcopy(self, {id(self.spec): self.spec})
        self.incubations = incubations
        child.host_key = host_key
        return child

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.host.parameters()).device

    def training_incubations(self) -> list[Incubation]:
        """Return the incubations whose training has begun."""
        return [incubation for incubation in self.incubations.values() if incubation.key.has_started]

    def incubate(self, key: SeedKey, env_seed: int, channels: int) -> Incubation:
        """Return the incubation of a seed key, born now if it is not there yet."""
        if key not in self.incubations:
            module = new_seed(self.spec, key, env_seed, channels, self.device)
            optimiser = make_optimiser(self.spec, list(module.parameters()), SEED_LR_FACTORS[key.seed_lr])
            self.incubations[key] = Incubation(key, module, optimiser, count_parameters(module))
        return self.incubations[key]

    def blend_in(self, slot: SlotState, env_seed: int) -> None:
        """Make an incubating seed part of the host, with a new gate if its blend has one; its optimiser state stays."""
        if slot.seed is None:
            raise ValueError("an empty slot cannot be blended in")
        incubation = self.incubations.pop(slot.seed)
        index = slot.seed.slot
        graft = Graft(incubation.module, 0.0, slot.isolated, fossil=False)
        self.network.grafts[index] = graft
        for group in incubation.optimiser.param_groups:
            self.optimiser.add_param_group(group)
        self.optimiser.state.update(incubation.optimiser.state)
        num_params = incubation.num_params
        if slot.blend_kind is Blend.GATED:
            channels = self.network.host.places[index].channels
            graft.gate = new_gate(self.spec, slot.seed, env_seed, channels, self.device)
            # A group of its own: torch's fused SGD fails on a group in which only some tensors have momentum.
            lr_factor = SEED_LR_FACTORS[slot.seed.seed_lr]
            self.optimiser.add_param_group({"params": list(graft.gate.parameters()), "lr_factor": lr_factor})
            num_params += count_parameters(graft.gate)
        self.seeds[index] = BlendedSeed(
            slot.seed, slot.blend_kind, slot.tempo_epochs, num_params, measures=incubation.measures
        )

    def plant_fossil(self, key: SeedKey, env_seed: int, channels: int) -> None:
        """Put a new seed straight into the committed network: the way in which a bigger root begins."""
        self.incubate(key, env_seed, channels)
        self.blend_in(SlotState(seed=key, blend=0, tempo=0, dwell=0, isolation=1), env_seed)
        self.seeds[key.slot].epochs_blended = self.seeds[key.slot].total_epochs
        self.network.grafts[key.slot].alpha = 1.0
        self.commit(key.slot)

    def commit(self, slot: int) -> None:
        """Fossilize: input no longer detached, weights at the host's learning rate, gate and optimiser state kept."""
        graft = self.network.grafts[slot]
        graft.isolated = False
        graft.fossil = True
        members = {id(parameter) for parameter in graft.parameters()}
        for group in self.optimiser.param_groups:
            if id(group["params"][0]) in members:
                group["lr_factor"] = 1.0

    def remove(self, slot: int) -> None:
        """Take a blended seed out of the host; what was measured of it together with others counts no longer."""
        graft = self.network.grafts.pop(slot)
        del self.seeds[slot]
        self.removal_cost_all = NAN
        for seed in self.seeds.values():
            seed.measures.interaction_sum = NAN
        members = {id(parameter) for parameter in graft.parameters()}
        self.optimiser.param_groups = [
            group for group in self.optimiser.param_groups if id(group["params"][0]) not in members
        ]
        for parameter in graft.parameters():
            self.optimiser.state.pop(parameter, None)

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of the environment's clock and the alphas of this epoch."""
        self.set_learning_rate(self.spec.learning_rate_at(epoch))
        for slot, seed in self.seeds.items():
            if not self.network.grafts[slot].fossil:
                seed.epochs_blended += 1
                self.network.grafts[slot].alpha = alpha_at(seed.blend, seed.epochs_blended, seed.total_epochs)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the host's learning rate; every seed keeps its multiple."""
        optimisers = [self.optimiser, *(incubation.optimiser for incubation in self.incubations.values())]
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * self.lr_scale * group["lr_factor"]

    def record(self, metrics: EpochMetrics) -> None:
        """Append an epoch's metrics and update the plateau counter (half a point resets it)."""
        if self.history:
            progress = 100 * (metrics.val_accuracy - self.history[-1].val_accuracy)
            self.plateau_epochs = self.plateau_epochs + 1 if progress < 0.5 else 0
        self.history.append(metrics)


def make_optimiser(spec: EnvironmentSpec, parameters: list[Tensor], lr_factor: float) -> torch.optim.Optimizer:
    """Return the environment's optimiser over one parameter group."""
    group = [{"params": parameters, "lr_factor": lr_factor}]
    learning_rate = spec.learning_rate * lr_factor
    if spec.optimiser == "adam":
        return torch.optim.Adam(group, lr=learning_rate, weight_decay=spec.weight_decay, fused=True)
    return torch.optim.SGD(group, lr=learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=True)


def new_seed(
    spec: EnvironmentSpec, key: SeedKey, env_seed: int, channels: int, device: torch.device = CPU
) -> nn.Module:
    """Return a seed initialised from (env_seed, slot, blueprint, birth epoch)."""
    with keyed_initialisation(env_seed, "seed-init", key.slot, key.blueprint, key.birth_epoch):
        module = build_blueprint(spec.host.topology, spec.blueprints[key.blueprint], channels)
    return lay_out(module).to(device)


def new_gate(
    spec: EnvironmentSpec, key: SeedKey, env_seed: int, channels: int, device: torch.device = CPU
) -> nn.Module:
    """Return the gate of a gated blend, initialised from (env_seed, slot, blueprint, birth epoch)."""
    with keyed_initialisation(env_seed, "gate-init", key.slot, key.blueprint, key.birth_epoch):
        gate = build_gate(spec.host.topology, channels)
    return gate.to(device)


def new_network(spec: EnvironmentSpec, env_seed: int, data: TaskData) -> Network:
    """Return the bare host, initialised from the environment seed."""
    with keyed_initialisation(env_seed, "host-init"):
        host = build_host(spec.host, data.shape)
    return Network(lay_out(host).to(data.device))
