"""Executors run one epoch of a list of lineages. A stacked or graph executor for a GPU is another class of this shape.

An epoch trains the host with its blended seeds and, beside it, every incubating seed (see `incubation`): the host stays
bit for bit what it would be without them. Then it validates and probes. Shape suffixes: N batches, B rows.

While the environment holds the host still, its own weights get no step at all: no gradient, decay or momentum. Seeds,
fossils among them, train on, and the host's batch norms go on following the activations that a blended seed changes:
running statistics describe the data, and stale ones would make validation wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.augment import draw_shifts, shifted
from esper.tolaria.gradients import GradientWatch, weight_change
from esper.tolaria.incubation import (
    clip_gradient,
    drop_gradients,
    learns_in,
    linearised,
    own_pass,
    step_seed,
    unseeded_loss,
)
from esper.tolaria.lineage import EpochMetrics, Lineage, SeedMeasures
from esper.tolaria.probes import batch_loss, finite_or_nan, validate
from esper.tolaria.runtime import torch_generator
from esper.tolaria.tasks import TaskData


class Executor(Protocol):
    """Runs one epoch of every lineage in the list, in place."""

    def run_epoch(self, lineages: Sequence[Lineage], data: TaskData, env_seed: int, epoch: int) -> None:
        """Train, validate and probe; sets metrics, measures and CPU seconds of the epoch."""
        ...


class SerialExecutor:
    """One lineage after another: on a CPU core stacking hosts does not pay."""

    def run_epoch(self, lineages: Sequence[Lineage], data: TaskData, env_seed: int, epoch: int) -> None:
        """Train, validate and probe each lineage."""
        for lineage in lineages:
            begin = time.thread_time()
            for incubation in lineage.incubations.values():
                incubation.cpu_s = 0.0
            lineage.begin_epoch(epoch)
            weights = list(lineage.network.host.parameters())
            before = [weight.detach().clone() for weight in weights]
            metrics = train_epoch(lineage, data, env_seed, epoch)
            lineage.host_weight_change = weight_change(before, weights)
            validate(lineage, data, metrics)
            lineage.record(metrics)
            own = sum(incubation.cpu_s for incubation in lineage.incubations.values())
            lineage.cpu_s = time.thread_time() - begin - own


def batch_order(lineage: Lineage, data: TaskData, env_seed: int, purpose: str, epoch: int) -> Tensor:
    """Return the row indices of an epoch, int64 [batches, B], keyed by (env_seed, purpose, epoch)."""
    spec = lineage.spec
    wanted = spec.batches_per_epoch * spec.batch_size
    generator = torch_generator(env_seed, purpose, epoch)
    rounds = -(-wanted // len(data.train))
    order = torch.cat([torch.randperm(len(data.train), generator=generator) for _ in range(rounds)])
    return order[:wanted].view(spec.batches_per_epoch, spec.batch_size).to(data.device)


def batches(
    lineage: Lineage, data: TaskData, env_seed: int, epoch: int, clock: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels of every batch of an epoch, augmented where the environment says so.

    Args:
        lineage: Whose environment.
        data: The task.
        env_seed: The environment seed.
        epoch: 0-based.
        clock: Put before the purpose of every draw: epochs of another clock have draws of their own.
    """
    order = batch_order(lineage, data, env_seed, f"{clock}order", epoch)
    shifts = None
    if lineage.spec.augment == "crop-flip":
        size = data.shape.resolution
        generators = [torch_generator(env_seed, f"{clock}augment", epoch, batch) for batch in range(len(order))]
        drawn = [draw_shifts(lineage.spec.batch_size, size, generator) for generator in generators]
        shifts = torch.stack(drawn).to(data.device)
    for position, index in enumerate(order):
        inputs = data.train.inputs[index]
        yield (inputs if shifts is None else shifted(inputs, shifts[position])), data.train.labels[index]


WARM_CLOCK = "warm-"


def warm_start(lineage: Lineage, data: TaskData, env_seed: int) -> None:
    """Train the bare host for the environment's warm-start epochs, on a clock of their own, before step 0."""
    epochs = lineage.spec.warm_start_epochs
    for epoch in range(epochs):
        lineage.set_learning_rate(lineage.spec.learning_rate_at(epoch, epochs))
        train_epoch(lineage, data, env_seed, epoch, WARM_CLOCK)


def train_epoch(lineage: Lineage, data: TaskData, env_seed: int, epoch: int, clock: str = "") -> EpochMetrics:
    """Train host, blended seeds and incubating seeds for one epoch; tensors are read once, at its end."""
    network = lineage.network
    incubations = lineage.training_incubations()
    drop_sums = torch.zeros(len(incubations), device=data.device)
    taps = [incubation.key.slot for incubation in incubations]
    has_seeds = bool(incubations or lineage.seeds)
    held_still = not clock and host_held_still(lineage.spec, epoch)
    host_weights, clipped = list(network.host.parameters()), clipped_weights(lineage)
    trained = [weight for group in lineage.optimiser.param_groups for weight in group["params"]]
    loss_sum, correct = torch.zeros((), device=data.device), torch.zeros((), dtype=torch.int64, device=data.device)
    answers = 0
    network.train_mode(True, torch_generator(env_seed, f"{clock}dropout", epoch) if network.has_dropout else None)
    last, watch = lineage.spec.batches_per_epoch - 1, None
    for position, (inputs, labels) in enumerate(batches(lineage, data, env_seed, epoch, clock)):
        if position == last and has_seeds:
            watch = GradientWatch(lineage)
        logits, tapped = network.run(inputs, taps) if watch is None else watch.run(inputs, taps)
        loss = batch_loss(logits, labels)
        drop_gradients(trained)
        for incubation in incubations:
            if incubation.key.incubation == "linearised":
                tapped[incubation.key.slot].retain_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if watch is not None:
            watch.after_backward()
        if incubations:
            with network.batch_statistics():
                drop_sums += incubate(lineage, tapped, labels, loss.detach(), epoch, watch)
        if held_still:
            drop_gradients(host_weights)
        for weights in clipped:
            clip_gradient(weights, lineage.spec.seed_gradient_clip)
        lineage.optimiser.step()
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(-1) == labels).sum()
        answers += labels.numel()
    for incubation, drop_sum in zip(incubations, drop_sums.tolist()):
        incubation.measures.train_loss_drop = finite_or_nan(drop_sum / (last + 1))
    if watch is not None:
        watch.record()
    for seed in lineage.seeds.values():
        forget_shadow_probes(seed.measures)
    mean_loss = float(loss_sum) / (last + 1)
    if not math.isfinite(mean_loss) or not weights_finite(lineage):
        lineage.non_finite = True
    return EpochMetrics(train_loss=finite_or_nan(mean_loss), train_accuracy=float(correct) / answers)


def incubate(
    lineage: Lineage,
    tapped: dict[int, Tensor],
    labels: Tensor,
    host_loss: Tensor,
    epoch: int,
    watch: GradientWatch | None,
) -> Tensor:
    """Train every incubating seed on a batch; return their loss drops, float [incubations].

    Called within `Network.batch_statistics`.

    Args:
        lineage: Whose seeds.
        tapped: The activations that arrived at their slots, with gradients where a seed is linearised.
        labels: Of the batch.
        host_loss: The host's loss on it.
        epoch: 0-based.
        watch: Collects gradients, on the last batch.
    """
    drops: list[Tensor] = []
    without: dict[int, Tensor] = {}
    for incubation in lineage.training_incubations():
        begin = time.thread_time()
        slot = incubation.key.slot
        learns = learns_in(incubation, epoch)
        if incubation.key.incubation == "linearised":
            drops.append(linearised(incubation, tapped[slot], needs_gradient=learns or watch is not None))
        else:
            if slot not in without:
                without[slot] = unseeded_loss(lineage, slot, tapped[slot], labels, host_loss)
            drops.append(without[slot] - own_pass(lineage, incubation, tapped[slot], labels))
        if watch is not None:
            watch.incubating(incubation)
        if learns:
            step_seed(incubation, lineage.spec.seed_gradient_clip)
        incubation.cpu_s += time.thread_time() - begin
    return torch.stack(drops)


def host_held_still(spec: EnvironmentSpec, epoch: int) -> bool:
    """Return whether the environment holds the host's own weights still in an epoch."""
    span = spec.host_frozen_epochs
    return span is not None and span[0] <= epoch < span[1]


def clipped_weights(lineage: Lineage) -> list[list[torch.nn.Parameter]]:
    """Return the weights of each blended seed that is no fossil, its gate's with them: each clipped by itself."""
    return [graft.parameters() for graft in lineage.network.grafts.values() if not graft.fossil]


def forget_shadow_probes(measures: SeedMeasures) -> None:
    """The shadow probes of a seed end with its incubation."""
    measures.train_loss_drop = measures.val_loss_drop = measures.seed_improvement = math.nan


def weights_finite(lineage: Lineage) -> bool:
    """Return whether every trained weight of the host and its seeds is finite."""
    weights = [weight.detach() for group in lineage.optimiser.param_groups for weight in group["params"]]
    return math.isfinite(float(sum(weight.sum() for weight in weights)))
