"""Validation and probes: shadow probes of incubating seeds, removal cost of blended ones.

A shadow probe compares the suffix at alpha = 1 with the host's, on the same batches, both on batch statistics; read
with running statistics it predicts nothing. Chunks have a fixed size, and variants are never concatenated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.tolaria.lineage import EpochMetrics, Incubation, Lineage
from esper.tolaria.tasks import Split, TaskData

CHUNK_ROWS = 512


def chunks(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels in chunks of CHUNK_ROWS; the last one is shorter."""
    for start in range(0, len(split), CHUNK_ROWS):
        yield split.x_NCHW[start : start + CHUNK_ROWS], split.y_N[start : start + CHUNK_ROWS]


class Tally:
    """Sums of loss and correct answers over a split."""

    def __init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64)
        self.correct = torch.zeros((), dtype=torch.int64)
        self.count = 0

    def add(self, logits: Tensor, y_B: Tensor) -> None:
        """Add one chunk."""
        self.loss += F.cross_entropy(logits, y_B, reduction="sum")
        self.correct += (logits.argmax(1) == y_B).sum()
        self.count += len(y_B)

    def mean_loss(self) -> float:
        """Return nats per row; NaN where it is not finite."""
        value = float(self.loss) / self.count
        return value if math.isfinite(value) else math.nan

    def accuracy(self) -> float:
        """Return the fraction of correct answers."""
        return float(self.correct) / self.count


@torch.no_grad()
def validate(lineage: Lineage, data: TaskData, metrics: EpochMetrics) -> None:
    """Fill in validation loss and accuracy, removal costs and shadow probes after an epoch."""
    lineage.network.train_mode(False)
    live = [slot for slot, graft in lineage.network.grafts.items() if not graft.fossil]
    host, without = Tally(), {slot: Tally() for slot in live}
    for x_BCHW, y_B in chunks(data.val):
        logits, tapped = lineage.network.run(x_BCHW, live)
        host.add(logits, y_B)
        for slot in live:
            without[slot].add(lineage.network.suffix(slot, tapped[slot]), y_B)
    metrics.val_loss = host.mean_loss()
    metrics.val_accuracy = host.accuracy()
    if math.isnan(metrics.val_loss):
        lineage.diverged = True
    for slot in live:
        _record_removal(lineage, slot, 100 * (host.accuracy() - without[slot].accuracy()))
    if lineage.incubations:
        with lineage.network.batch_statistics():
            _shadow_probes(lineage, data.val, list(lineage.incubations.values()))


def _record_removal(lineage: Lineage, slot: int, cost_points: float) -> None:
    measures = lineage.seeds[slot].measures
    if math.isfinite(measures.removal_cost):
        change = cost_points - measures.removal_cost
        before = measures.removal_cost_velocity
        measures.removal_cost_velocity = change if math.isnan(before) else 0.7 * before + 0.3 * change
    measures.removal_cost = cost_points


def _shadow_probes(lineage: Lineage, split: Split, incubations: Sequence[Incubation]) -> None:
    host, shadows = Tally(), [Tally() for _ in incubations]
    taps = [incubation.key.slot for incubation in incubations]
    for x_BCHW, y_B in chunks(split):
        logits, tapped = lineage.network.run(x_BCHW, taps)
        host.add(logits, y_B)
        for incubation, tally in zip(incubations, shadows):
            begin = time.thread_time()
            h_BCHW = tapped[incubation.key.slot]
            tally.add(lineage.network.suffix(incubation.key.slot, h_BCHW + incubation.module(h_BCHW)), y_B)
            incubation.cpu_s += time.thread_time() - begin
    for incubation, tally in zip(incubations, shadows):
        incubation.measures.val_loss_drop = host.mean_loss() - tally.mean_loss()
        incubation.measures.seed_improvement = 100 * (tally.accuracy() - host.accuracy())
        if math.isnan(incubation.measures.val_loss_drop):
            incubation.measures.seed_improvement = math.nan


def measure_weights(parameters: Sequence[Tensor]) -> float:
    """Return the L2 norm of all weights; NaN where it is not finite."""
    norm = float(torch.stack([p.detach().norm() for p in parameters]).norm())
    return norm if math.isfinite(norm) else math.nan


@torch.no_grad()
def score(run: Callable[[Tensor], Tensor], split: Split) -> float:
    """Return the accuracy of a forward function on a whole split, a fraction."""
    tally = Tally()
    for x_BCHW, y_B in chunks(split):
        tally.add(run(x_BCHW), y_B)
    return tally.accuracy()
