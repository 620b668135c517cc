"""Executors run one epoch of a list of lineages. A stacked or graph executor for a GPU is another class of this shape.

An epoch trains the host and, beside it, every incubating seed through its own pass of the suffix, y = h + delta(h)
with h detached, host weights frozen and batch statistics that leave the running ones alone: the host stays bit for bit
what it would be without the seeds. Then it validates and probes. Shape suffixes: B batch, C, H, W.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.tolaria.lineage import BlendedSeed, EpochMetrics, Incubation, Lineage, SeedMeasures
from esper.tolaria.probes import measure_weights, validate
from esper.tolaria.runtime import torch_generator
from esper.tolaria.tasks import TaskData

VANISHING_NORM = 1e-7
EXPLODING_NORM = 10.0


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
            metrics = train_epoch(lineage, data, batch_order(lineage, data, env_seed, "order", epoch))
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
    return order[:wanted].view(spec.batches_per_epoch, spec.batch_size)


def warm_start(lineage: Lineage, data: TaskData, env_seed: int) -> None:
    """Train the bare host for the environment's warm-start epochs, on a clock of their own, before step 0."""
    epochs = lineage.spec.warm_start_epochs
    for epoch in range(epochs):
        lineage.set_learning_rate(lineage.spec.learning_rate_at(epoch, epochs))
        train_epoch(lineage, data, batch_order(lineage, data, env_seed, "warm-order", epoch))


def train_epoch(lineage: Lineage, data: TaskData, order_NB: Tensor) -> EpochMetrics:
    """Train host, blended seeds and incubating seeds for one epoch; one synchronisation, at its end."""
    network, optimiser = lineage.network, lineage.optimiser
    incubations = list(lineage.incubations.values())
    taps = [incubation.key.slot for incubation in incubations]
    network.train_mode(True)
    loss_sum = torch.zeros(())
    correct = torch.zeros((), dtype=torch.int64)
    drops = [torch.zeros(()) for _ in incubations]
    for index in order_NB:
        x_BCHW, y_B = data.train.x_NCHW[index], data.train.y_N[index]
        logits, tapped = network.run(x_BCHW, taps)
        loss = F.cross_entropy(logits, y_B)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if incubations:
            with network.batch_statistics():
                for position, incubation in enumerate(incubations):
                    own = own_pass(lineage, incubation, tapped[incubation.key.slot], y_B)
                    drops[position] += loss.detach() - own
        clip_seed_gradients(lineage)
        optimiser.step()
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == y_B).sum()
    num_batches = len(order_NB)
    for incubation, drop in zip(incubations, drops):
        incubation.measures.train_loss_drop = finite_or_nan(float(drop) / num_batches)
        measure_gradients(list(incubation.module.parameters()), incubation.measures)
    for slot, seed in lineage.seeds.items():
        measure_blended_gradients(lineage, slot, seed)
    mean_loss = float(loss_sum) / num_batches
    if not math.isfinite(mean_loss) or not weights_finite(lineage):
        lineage.diverged = True
    return EpochMetrics(train_loss=finite_or_nan(mean_loss), train_accuracy=float(correct) / order_NB.numel())


def own_pass(lineage: Lineage, incubation: Incubation, h_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Train a seed on h + delta(h.detach()) through the frozen suffix; returns its loss (a detached scalar)."""
    begin = time.thread_time()
    source = h_BCHW.detach().requires_grad_()
    logits = lineage.network.suffix(incubation.key.slot, h_BCHW.detach() + incubation.module(source))
    loss = F.cross_entropy(logits, y_B)
    parameters = list(incubation.module.parameters())
    # The input's gradient is asked for too: without it GroupNorm's backward crashes on a channels_last input.
    gradients = torch.autograd.grad(loss, [*parameters, source])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, lineage.spec.seed_gradient_clip, foreach=True)
    incubation.optimiser.step()
    incubation.cpu_s += time.thread_time() - begin
    return loss.detach()


def clip_seed_gradients(lineage: Lineage) -> None:
    """Clip the gradient of each blended seed that is no fossil, apart from the host's."""
    for graft in lineage.network.grafts.values():
        if not graft.fossil:
            clip = lineage.spec.seed_gradient_clip
            torch.nn.utils.clip_grad_norm_(graft.module.parameters(), clip, foreach=True)


def measure_gradients(parameters: Sequence[Tensor], measures: SeedMeasures) -> None:
    """Record norm and health of a seed's last (clipped) gradients.

    Health is 1 - .5 * share vanishing (< 1e-7) - .8 * share exploding (> 10), over parameter tensors.
    """
    norms = torch.stack([p.grad.norm() if p.grad is not None else torch.zeros(()) for p in parameters]).tolist()
    measures.gradient_health_previous = measures.gradient_health
    vanishing = sum(norm < VANISHING_NORM for norm in norms) / len(norms)
    exploding = sum(not norm <= EXPLODING_NORM for norm in norms) / len(norms)
    measures.gradient_norm = finite_or_nan(math.sqrt(sum(norm * norm for norm in norms)))
    measures.gradient_vanishing = vanishing
    measures.gradient_exploding = exploding
    measures.gradient_health = max(0.0, 1 - 0.5 * vanishing - 0.8 * exploding)
    measures.weight_norm = measure_weights(parameters)


def measure_blended_gradients(lineage: Lineage, slot: int, seed: BlendedSeed) -> None:
    """Record the gradients of a blended seed; its shadow probes end with its incubation."""
    seed.measures.train_loss_drop = seed.measures.val_loss_drop = seed.measures.seed_improvement = math.nan
    measure_gradients(list(lineage.network.grafts[slot].module.parameters()), seed.measures)


def weights_finite(lineage: Lineage) -> bool:
    """Return whether every trained weight of the host and its seeds is finite."""
    total = torch.zeros(())
    for group in lineage.optimiser.param_groups:
        for parameter in group["params"]:
            total = total + parameter.detach().sum()
    return math.isfinite(float(total))


def finite_or_nan(value: float) -> float:
    """Return the value, or NaN for an infinite one: unmeasured, never a wild number."""
    return value if math.isfinite(value) else math.nan
