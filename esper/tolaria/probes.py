"""Validation and probes: shadow probes of incubating seeds, removal cost of blended ones.

A shadow probe compares the suffix at alpha = 1 with the host's, on the same batches, both on batch statistics; read
with running statistics it predicts nothing. Chunks have a fixed size, and variants are never concatenated.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.network import Network
from esper.tolaria.lineage import MILESTONES, EpochMetrics, Incubation, Lineage
from esper.tolaria.tasks import Split, TaskData

CHUNK_ANSWERS = 512
"""Rows of images in a chunk; of text, as many rows as have four times that many tokens."""

TOKENS_PER_ANSWER = 4

ALPHA_SLACK = 1e-6
"""A sigmoid reaches its half and its end up to rounding."""


def chunks(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels in chunks of a fixed number of rows; the last one is shorter."""
    tokens = split.labels.shape[1:].numel()
    rows = CHUNK_ANSWERS if split.labels.dim() == 1 else max(1, CHUNK_ANSWERS * TOKENS_PER_ANSWER // tokens)
    for start in range(0, len(split), rows):
        yield split.inputs[start : start + rows], split.labels[start : start + rows]


def batch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch in nats, over rows of images or over tokens of text.

    Args:
        logits: Float [B, classes] or [B, T, vocabulary].
        labels: Int64 [B] or [B, T].
    """
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Tally:
    """Sums of loss and correct answers over a split: rows of images or tokens of text."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int = 0
        self.count = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one chunk: logits [B, classes] with labels [B], or [B, T, vocabulary] with [B, T]."""
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        self.loss = self.loss + total.double()
        self.correct = self.correct + (logits.argmax(-1) == labels).sum()
        self.count += labels.numel()

    def mean_loss(self) -> float:
        """Return nats per answer; NaN where it is not finite."""
        return finite_or_nan(float(self.loss) / self.count)

    def accuracy(self) -> float:
        """Return the fraction of correct answers."""
        return float(self.correct) / self.count


@contextmanager
def switched_off(network: Network, slots: Collection[int]) -> Iterator[None]:
    """Within it, the network runs without the grafts of some slots."""
    grafts = network.grafts
    network.grafts = {slot: graft for slot, graft in grafts.items() if slot not in slots}
    try:
        yield
    finally:
        network.grafts = grafts


@torch.no_grad()
def validate(lineage: Lineage, data: TaskData, metrics: EpochMetrics) -> None:
    """Fill in validation loss and accuracy, removal costs and shadow probes after an epoch.

    What a switched-off seed changes begins at its slot, so every variant is a pass of the suffix from its first slot.
    """
    network = lineage.network
    network.train_mode(False)
    live = sorted(slot for slot, graft in network.grafts.items() if not graft.fossil)
    host, without = Tally(), {variant: Tally() for variant in _variants(live, lineage.spec.probe_pairs)}
    for x, y in chunks(data.val_epoch):
        logits, tapped = network.run(x, live)
        host.add(logits, y)
        for variant, tally in without.items():
            with switched_off(network, variant):
                tally.add(network.suffix(variant[0], tapped[variant[0]]), y)
    metrics.val_loss = host.mean_loss()
    metrics.val_accuracy = host.accuracy()
    costs = {variant: 100 * (host.accuracy() - tally.accuracy()) for variant, tally in without.items()}
    if math.isnan(metrics.val_loss):
        lineage.non_finite = True
        costs = dict.fromkeys(costs, math.nan)
    for slot in live:
        _record_removal(lineage, slot, costs[slot,])
        asked = lineage.spec.probe_pairs
        lineage.seeds[slot].measures.interaction_sum = _interaction_sum(slot, costs) if asked else math.nan
    lineage.removal_cost_all = costs[tuple(live)] if live else math.nan
    started = [incubation for incubation in lineage.incubations.values() if incubation.key.has_started]
    if started:
        with network.batch_statistics():
            _shadow_probes(lineage, data.val_epoch, started)


def _variants(live: Sequence[int], with_pairs: bool) -> list[tuple[int, ...]]:
    """The sets of slots to switch off, each rising: every one, every pair where asked, all."""
    sizes = {1, len(live), *((2,) if with_pairs else ())}
    return [variant for size in sorted(sizes) for variant in itertools.combinations(live, size) if variant]


def _interaction_sum(slot: int, costs: Mapping[tuple[int, ...], float]) -> float:
    """Sum of I_ij = f(ij) - f(i) - f(j) + f(none) over a slot's pairs, in points; NaN where no pair was measured.

    In removal costs: I_ij = cost(i) + cost(j) - cost(ij).
    """
    pairs = [variant for variant in costs if len(variant) == 2 and slot in variant]
    if not pairs:
        return math.nan
    return sum(costs[one,] + costs[other,] - costs[one, other] for one, other in pairs)


def _record_removal(lineage: Lineage, slot: int, cost_points: float) -> None:
    measures = lineage.seeds[slot].measures
    if math.isfinite(measures.removal_cost):
        change = cost_points - measures.removal_cost
        before = measures.removal_cost_velocity
        measures.removal_cost_velocity = change if math.isnan(before) else 0.7 * before + 0.3 * change
    measures.removal_cost = cost_points
    alpha = lineage.network.grafts[slot].alpha
    for milestone, share in enumerate(MILESTONES):
        if alpha >= share - ALPHA_SLACK and math.isnan(measures.contributions[milestone]):
            measures.contributions[milestone] = cost_points


def _shadow_probes(lineage: Lineage, split: Split, incubations: Sequence[Incubation]) -> None:
    host, shadows = Tally(), [Tally() for _ in incubations]
    taps = [incubation.key.slot for incubation in incubations]
    for x, y in chunks(split):
        logits, tapped = lineage.network.run(x, taps)
        host.add(logits, y)
        for incubation, tally in zip(incubations, shadows):
            begin = time.thread_time()
            h = tapped[incubation.key.slot]
            tally.add(lineage.network.suffix(incubation.key.slot, h + incubation.module(h)), y)
            incubation.cpu_s += time.thread_time() - begin
    for incubation, tally in zip(incubations, shadows):
        incubation.measures.val_loss_drop = host.mean_loss() - tally.mean_loss()
        incubation.measures.seed_improvement = 100 * (tally.accuracy() - host.accuracy())
        if math.isnan(incubation.measures.val_loss_drop):
            incubation.measures.seed_improvement = math.nan


def measure_weights(parameters: Sequence[Tensor]) -> float:
    """Return the L2 norm of all weights; NaN where it is not finite."""
    return finite_or_nan(float(torch.stack([p.detach().norm() for p in parameters]).norm()))


def finite_or_nan(value: float) -> float:
    """Return the value, or NaN for an infinite one: unmeasured, never a wild number."""
    return value if math.isfinite(value) else math.nan


@torch.no_grad()
def score(run: Callable[[Tensor], Tensor], split: Split) -> float:
    """Return the accuracy of a forward function on a whole split, a fraction."""
    tally = Tally()
    for x, y in chunks(split):
        tally.add(run(x), y)
    return tally.accuracy()
