"""A host with the seeds that it knows: those being blended, holding or fossilized.

An incubating seed is not part of it: until it is blended in, the host is bit for bit what it would be without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.kasmina.hosts import BatchNorm, Host


@dataclass(slots=True)
class Graft:
    """A seed in the forward pass: y = h + alpha * delta(h), the input detached where it is isolated."""

    module: nn.Module
    alpha: float
    isolated: bool
    fossil: bool

    def apply(self, h_BCHW: Tensor) -> Tensor:
        """Return the blended activation; the identity path always carries the host's gradient."""
        # requires_grad_: GroupNorm's backward crashes on a channels_last input that does not require grad.
        source = h_BCHW.detach().requires_grad_() if self.isolated else h_BCHW
        return torch.add(h_BCHW, self.module(source), alpha=self.alpha)


class Network(nn.Module):
    """Host plus grafts by slot."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.grafts: dict[int, Graft] = {}
        self._norms = [module for module in host.modules() if isinstance(module, BatchNorm)]

    def train_mode(self, training: bool) -> None:
        """Switch the host's batch norms; seeds have no such mode."""
        for norm in self._norms:
            norm.training = training

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Within it, batch norms use batch statistics and leave the running ones alone."""
        for norm in self._norms:
            norm.probing = True
        try:
            yield
        finally:
            for norm in self._norms:
                norm.probing = False

    def run(self, x_BCHW: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Return logits [B, classes] and, for the slots in `taps`, the activation that arrives at the slot."""
        tapped: dict[int, Tensor] = {}
        h_BCHW = x_BCHW
        for slot in range(len(self.host.segments)):
            h_BCHW = self.host.segment(slot, h_BCHW)
            if slot in taps:
                tapped[slot] = h_BCHW
            graft = self.grafts.get(slot)
            if graft is not None:
                h_BCHW = graft.apply(h_BCHW)
        return self.host.classify(h_BCHW), tapped

    def suffix(self, slot: int, h_BCHW: Tensor) -> Tensor:
        """Return logits from the activation that leaves a slot."""
        for later in range(slot + 1, len(self.host.segments)):
            h_BCHW = self.host.segment(later, h_BCHW)
            graft = self.grafts.get(later)
            if graft is not None:
                h_BCHW = graft.apply(h_BCHW)
        return self.host.classify(h_BCHW)
