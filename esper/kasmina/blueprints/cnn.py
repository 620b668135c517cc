"""Blueprints: modules that return the increment delta of a seed, y = h + alpha * delta(h_in).

Every blueprint keeps shape, normalises with GroupNorm (no running statistics) and is exactly zero at birth: its last
operation is a zero-initialised scale or convolution with nothing after it, so its gradient at birth is not zero.
(Zero-initialised and followed by GroupNorm and ReLU it would have no gradient; followed by GroupNorm alone, one
thousands of times too large.) Shape suffixes: B batch, C channels, H height, W width.
Source: ReZero, Bachlechner et al. 2020; squeeze-excite, Hu et al. 2018.

How to try a new one: docs/blueprints.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MIN_CHANNELS_PER_GROUP = 16
MAX_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with the most groups (at most 32) that leave 16 channels in each, else one group."""
    groups = MAX_GROUPS
    while groups > 1 and (channels % groups or channels // groups < MIN_CHANNELS_PER_GROUP):
        groups //= 2
    return nn.GroupNorm(groups, channels)


SCALE_GAIN = 3.0
"""A factor that starts at zero and moves at the seed's learning rate keeps the convolutions behind it from learning for
epochs; with this gain it moves 9 times as fast. With 4, heavy seeds at a learning rate of 0.6 were seen to explode."""


class ZeroScale(nn.Module):
    """A learned factor per channel, SCALE_GAIN times its weight, zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return x * SCALE_GAIN * weight."""
        return x_BCHW * (SCALE_GAIN * self.weight)


def _conv_norm_relu(channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, group_norm(channels), nn.ReLU())


class Norm(nn.Module):
    """delta = scale * (GroupNorm(h) - h)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.scale = ZeroScale(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the increment."""
        out: Tensor = self.scale(self.norm(x_BCHW) - x_BCHW)
        return out


class Attention(nn.Module):
    """Squeeze-excite with gate 1 + tanh: delta = h * tanh(W2 relu(W1 pool(h))), W2 zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(2, channels // 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the increment."""
        pooled_BC = x_BCHW.mean(dim=(2, 3))
        gate_BC = torch.tanh(self.excite(torch.relu(self.squeeze(pooled_BC))))
        return x_BCHW * gate_BC[:, :, None, None]


class Scaled(nn.Module):
    """delta = scale * body(h)."""

    def __init__(self, channels: int, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.scale = ZeroScale(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the increment."""
        out: Tensor = self.scale(self.body(x_BCHW))
        return out


def conv_small(channels: int) -> nn.Module:
    """A 1x1 convolution."""
    return Scaled(channels, _conv_norm_relu(channels, 1))


def conv_light(channels: int) -> nn.Module:
    """A 3x3 convolution."""
    return Scaled(channels, _conv_norm_relu(channels, 3))


def conv_heavy(channels: int) -> nn.Module:
    """Two 3x3 convolutions, the second without a ReLU: with one the increment of a channel has one sign at all places.

    A single convolution keeps its ReLU, without which it would add nothing but a linear map.
    """
    last = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return Scaled(channels, nn.Sequential(*_conv_norm_relu(channels, 3), last, group_norm(channels)))


def dilated(channels: int) -> nn.Module:
    """A 3x3 convolution with dilation 2."""
    return Scaled(channels, _conv_norm_relu(channels, 3, dilation=2))


def depthwise(channels: int) -> nn.Module:
    """A depthwise 3x3 and a pointwise convolution."""
    spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return Scaled(channels, nn.Sequential(spatial, *_conv_norm_relu(channels, 1)))


def bottleneck(channels: int) -> nn.Module:
    """1x1 down, 3x3, 1x1 up; the last one is zero at birth."""
    hidden = max(8, channels // 4)
    up = nn.Conv2d(hidden, channels, 1, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.ReLU(),
        up,
    )


CNN_REGISTRY: dict[str, Callable[[int], nn.Module]] = {
    "norm": Norm,
    "attention": Attention,
    "conv_small": conv_small,
    "bottleneck": bottleneck,
    "depthwise": depthwise,
    "dilated": dilated,
    "conv_light": conv_light,
    "conv_heavy": conv_heavy,
}
