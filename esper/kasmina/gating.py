"""The gate of a gated blend: y = h + alpha * g(h) * delta(h), g a number in (0, 1) that the activation itself decides.

One number per image, from the mean over its pixels; one per token, from that token alone (so that a gate never looks
ahead). Shape suffixes: B batch, T tokens, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from esper.leyline.host_specs import Topology

MIN_HIDDEN = 8


def _hidden(channels: int) -> int:
    return max(MIN_HIDDEN, channels // 4)


class Gate(nn.Module):
    """Linear, ReLU, Linear to one number, sigmoid."""

    def __init__(self, topology: Topology, channels: int) -> None:
        super().__init__()
        self.pooled = topology == "cnn"
        self.score = nn.Sequential(
            nn.Linear(channels, _hidden(channels)), nn.ReLU(), nn.Linear(_hidden(channels), 1), nn.Sigmoid()
        )

    def forward(self, h: Tensor) -> Tensor:
        """Return g of an activation [B, C, H, W] as [B, 1, 1, 1], of [B, T, C] as [B, T, 1]."""
        if self.pooled:
            g_B1: Tensor = self.score(h.mean(dim=(2, 3)))
            return g_B1[:, :, None, None]
        g_BT1: Tensor = self.score(h)
        return g_BT1


def build_gate(topology: Topology, channels: int) -> nn.Module:
    """Return a freshly initialised gate for a slot of that many channels."""
    return Gate(topology, channels)


def gate_params(channels: int) -> int:
    """Return how many parameters `build_gate` gives; the same for both topologies."""
    hidden = _hidden(channels)
    return (channels + 1) * hidden + hidden + 1
