"""A host with the seeds that it knows: those being blended, holding or fossilized.

An incubating seed is not part of it: until it is blended in, the host is bit for bit what it would be without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.kasmina.hosts import BatchNorm, Host, KeyedDropout


@dataclass(slots=True)
class Graft:
    """A seed in the forward pass: y = h + alpha * g * delta(h), g = 1 or a learned gate that reads h.

    Seed and gate see h detached where the graft is isolated.
    """

    module: nn.Module
    alpha: float
    isolated: bool
    fossil: bool
    gate: nn.Module | None = None

    def apply(self, h: Tensor) -> Tensor:
        """Return the blended activation; the identity path always carries the host's gradient."""
        # requires_grad_: GroupNorm's backward crashes on a channels_last input that does not require grad.
        source = h.detach().requires_grad_() if self.isolated else h
        delta = self.module(source)
        if self.gate is not None:
            delta = self.gate(source) * delta
        return torch.add(h, delta, alpha=self.alpha)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the seed, then those of its gate."""
        gate = [] if self.gate is None else list(self.gate.parameters())
        return [*self.module.parameters(), *gate]


class Network(nn.Module):
    """Host plus grafts by slot."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.grafts: dict[int, Graft] = {}
        self._norms = [module for module in host.modules() if isinstance(module, BatchNorm)]
        self._dropouts = [module for module in host.modules() if isinstance(module, KeyedDropout)]

    @property
    def has_dropout(self) -> bool:
        """Whether the host drops activations while it trains."""
        return any(dropout.p > 0 for dropout in self._dropouts)

    def train_mode(self, training: bool, dropout: torch.Generator | None = None) -> None:
        """Switch the host's batch norms and its dropout; seeds have no such modes.

        Args:
            training: Whether batch norms use batch statistics and update the running ones.
            dropout: Where the host's dropout draws from; without it nothing is dropped.
        """
        for norm in self._norms:
            norm.training = training
        self.host.set_dropout(dropout)

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Within it, batch norms use batch statistics and leave the running ones alone, and nothing is dropped."""
        draws = [layer.generator for layer in self._dropouts]
        for norm in self._norms:
            norm.probing = True
        for layer in self._dropouts:
            layer.generator = None
        try:
            yield
        finally:
            for norm in self._norms:
                norm.probing = False
            for layer, generator in zip(self._dropouts, draws):
                layer.generator = generator

    def run(
        self, x: Tensor, taps: Sequence[int] = (), left: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return logits and, for the slots in `taps`, the activation that arrives at the slot.

        Args:
            x: A batch of inputs.
            taps: Slots.
            left: Filled with the activation that leaves each slot that holds a graft.
        """
        tapped: dict[int, Tensor] = {}
        h = x
        for slot in range(len(self.host.segments)):
            h = self.host.segment(slot, h)
            if slot in taps:
                tapped[slot] = h
            graft = self.grafts.get(slot)
            if graft is not None:
                h = graft.apply(h)
                if left is not None:
                    left[slot] = h
        return self.host.classify(h), tapped

    def suffix(self, slot: int, h: Tensor) -> Tensor:
        """Return logits from the activation that leaves a slot."""
        for later in range(slot + 1, len(self.host.segments)):
            h = self.host.segment(later, h)
            graft = self.grafts.get(later)
            if graft is not None:
                h = graft.apply(h)
        return self.host.classify(h)
