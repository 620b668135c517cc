"""Blueprints of transformer hosts: increments of a residual stream, y = h + alpha * delta(h_in).

As those of convolutional hosts they keep shape and are exactly zero at birth: the last operation is a zero-initialised
scale or linear layer with nothing after it. Those that bend the stream see it through a LayerNorm, since its size grows
with depth. All are strictly causal: what a token gets depends on it and on earlier tokens alone.
Shape suffixes: B batch, T tokens, C channels, N heads, D channels of a head.
Source: LoRA, Hu et al. 2022; SwiGLU, Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

MAX_HEADS = 4
CONV_TOKENS = 4
"""How many tokens the causal convolution sees, itself among them."""


def _zero_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def num_heads(channels: int) -> int:
    """Return the most attention heads, at most four, that divide the width."""
    return next(heads for heads in range(MAX_HEADS, 0, -1) if channels % heads == 0)


class Norm(nn.Module):
    """delta = scale * (LayerNorm(h) - h), one scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the increment."""
        out: Tensor = (self.norm(x_BTC) - x_BTC) * self.scale
        return out


class Attention(nn.Module):
    """Causal self-attention of the normalised stream; its output layer is zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = num_heads(channels)
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.out = _zero_linear(channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the increment."""
        projected = self.query_key_value(self.norm(x_BTC)).unflatten(-1, (3, self.heads, -1))
        query_BNTD, key_BNTD, value_BNTD = projected.permute(2, 0, 3, 1, 4)
        mixed_BNTD = nn.functional.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, is_causal=True)
        out: Tensor = self.out(mixed_BNTD.transpose(1, 2).flatten(2))
        return out


class GatedMlp(nn.Module):
    """SwiGLU: W3 (silu(W1 h) * W2 h), as many parameters as `mlp`; W3 is zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, 8 * channels // 3)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * hidden)
        self.down = _zero_linear(hidden, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the increment."""
        gate, value = self.up(self.norm(x_BTC)).chunk(2, dim=-1)
        out: Tensor = self.down(nn.functional.silu(gate) * value)
        return out


class CausalConv(nn.Module):
    """A depthwise convolution over this token and the three before it, then a linear layer that is zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.depthwise = nn.Conv1d(channels, channels, CONV_TOKENS, groups=channels)
        self.out = _zero_linear(channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the increment."""
        past_BCT = nn.functional.pad(self.norm(x_BTC).transpose(1, 2), (CONV_TOKENS - 1, 0))
        mixed_BTC = self.depthwise(past_BCT).transpose(1, 2)
        out: Tensor = self.out(nn.functional.silu(mixed_BTC))
        return out


def lora(channels: int, rank: int) -> nn.Module:
    """Two linear layers through a narrow waist, nothing between them."""
    return nn.Sequential(nn.Linear(channels, rank, bias=False), _zero_linear(rank, channels, bias=False))


def mlp(channels: int, factor: int) -> nn.Module:
    """A hidden layer so many times as wide as the stream."""
    hidden = factor * channels
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), _zero_linear(hidden, channels))


TRANSFORMER_REGISTRY: dict[str, Callable[[int], nn.Module]] = {
    "norm": Norm,
    "lora": partial(lora, rank=8),
    "lora_large": partial(lora, rank=32),
    "attention": Attention,
    "mlp_small": partial(mlp, factor=2),
    "mlp": partial(mlp, factor=4),
    "gated_mlp": GatedMlp,
    "conv": CausalConv,
}
