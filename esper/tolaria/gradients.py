"""What the last batch of an epoch tells about gradients, before any clipping.

They are collected as tensors while the batch trains and read once the epoch is over.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.lifecycle import SeedKey
from esper.tolaria.lineage import Incubation, Lineage, SeedMeasures
from esper.tolaria.probes import finite_or_nan, measure_weights

VANISHING_NORM = 1e-7
EXPLODING_NORM = 10.0
MAX_GRADIENT_RATIO = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGradient:
    """The norm of the host's gradient, and the number of weights that have one (frozen ones do not)."""

    norm: float
    num_params: int


class GradientWatch:
    """Collects, during one batch, the gradients of host, blended and incubating seeds.

    An activation h with y = h + alpha * delta(h) gets dL/dy along the identity path; what it gets beyond that came
    through the seed. Keeping both gradients changes no bit of the backward pass.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        grafts = lineage.network.grafts
        self.slots = [slot for slot, graft in grafts.items() if not graft.isolated]
        self._left: dict[int, Tensor] = {}
        self._arrived: dict[int, Tensor] = {}
        self._norms: dict[SeedKey, Tensor] = {}
        self._through: dict[int, Tensor] = {}
        self._host_norm = torch.zeros(())
        self._host_params = 0

    def run(self, inputs: Tensor, taps: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the network as `Network.run` does, asking for the gradients that arrive at the slots and leave them."""
        logits, tapped = self.lineage.network.run(inputs, [*taps, *self.slots], self._left)
        for slot in self.slots:
            self._arrived[slot] = tapped[slot]
            for activation in (tapped[slot], self._left[slot]):
                activation.retain_grad()
        return logits, tapped

    def after_backward(self) -> None:
        """Take the gradients of the host and of its seeds, before they are clipped or dropped."""
        gradients = [p.grad for p in self.lineage.network.host.parameters() if p.grad is not None]
        self._host_norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        self._host_params = sum(gradient.numel() for gradient in gradients)
        for slot, seed in self.lineage.seeds.items():
            self._norms[seed.key] = tensor_norms(self.lineage.network.grafts[slot].parameters())
        for slot in self.slots:
            arrived, left = self._arrived[slot].grad, self._left[slot].grad
            if arrived is not None and left is not None:
                self._through[slot] = (arrived - left).norm()

    def incubating(self, incubation: Incubation) -> None:
        """Take the gradient of an incubating seed, before it is clipped."""
        self._norms[incubation.key] = tensor_norms(list(incubation.module.parameters()))

    def record(self) -> None:
        """Read what was collected and record it in the seeds' measures."""
        host = HostGradient(norm=float(self._host_norm), num_params=self._host_params)
        for incubation in self.lineage.training_incubations():
            parameters = list(incubation.module.parameters())
            record_gradients(incubation.measures, self._norms[incubation.key].tolist(), parameters, host)
        for slot, seed in self.lineage.seeds.items():
            parameters = list(self.lineage.network.grafts[slot].parameters())
            record_gradients(seed.measures, self._norms[seed.key].tolist(), parameters, host)
            through = self._through.get(slot)
            seed.measures.gradient_through_seed = 0.0 if through is None else finite_or_nan(float(through))


def tensor_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradient per parameter tensor, float [tensors]; 0 where there is none."""
    return torch.stack([p.grad.norm() if p.grad is not None else p.new_zeros(()) for p in parameters])


def record_gradients(
    measures: SeedMeasures, norms: Sequence[float], parameters: Sequence[Tensor], host: HostGradient
) -> None:
    """Record norm, health and history of a seed's gradients in one epoch, and the norm of its weights.

    Health is 1 - .5 * share vanishing (< 1e-7) - .8 * share exploding (> 10), over parameter tensors. The ratio is of
    root mean squares, seed over host, at most 10. The variation is the population's standard deviation over the mean.

    Args:
        measures: Where to.
        norms: The gradient's norm per parameter tensor.
        parameters: The seed's, its gate's included.
        host: The host's gradient on the same batch.
    """
    norm = math.sqrt(sum(value * value for value in norms))
    vanishing = sum(value < VANISHING_NORM for value in norms) / len(norms)
    exploding = sum(not value <= EXPLODING_NORM for value in norms) / len(norms)
    measures.gradient_health_previous = measures.gradient_health
    measures.gradient_norm = finite_or_nan(norm)
    measures.gradient_vanishing = vanishing
    measures.gradient_exploding = exploding
    measures.gradient_health = max(0.0, 1 - 0.5 * vanishing - 0.8 * exploding)
    measures.weight_norm = measure_weights(parameters)
    num_params = sum(parameter.numel() for parameter in parameters)
    measures.gradient_ratio = _ratio(norm * math.sqrt(host.num_params), host.norm * math.sqrt(num_params))
    measures.gradient_norms.append(norm)
    measures.gradient_variation = _variation(measures.gradient_norms)
    measures.stable_epochs += exploding == 0
    measures.stable_share = measures.stable_epochs / len(measures.gradient_norms)


def _ratio(seed: float, host: float) -> float:
    if not math.isfinite(seed) or not math.isfinite(host) or seed == host == 0:
        return math.nan
    return MAX_GRADIENT_RATIO if seed >= MAX_GRADIENT_RATIO * host else seed / host


def _variation(norms: Sequence[float]) -> float:
    if len(norms) < 2 or not all(math.isfinite(norm) for norm in norms) or sum(norms) == 0:
        return math.nan
    return statistics.pstdev(norms) / statistics.fmean(norms)


def weight_change(before: Sequence[Tensor], now: Sequence[Tensor]) -> float:
    """Return ||now - before|| / ||before||; NaN where it is not finite."""
    moved = torch.nn.utils.get_total_norm([new.detach() - old for new, old in zip(now, before)], foreach=True)
    start = torch.nn.utils.get_total_norm(list(before), foreach=True)
    return finite_or_nan(float(moved / start))
