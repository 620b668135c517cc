"""Batch norm, max-pool and ReLU of convolutional blocks, on the shortest way. Shape suffixes: B batch, C, H, W."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_FUSED_PIXELS = 256
"""From so large activations on, fewer passes over memory pay for the calls of `pooled_norm`."""


def max_pool_relu(x_BCHW: Tensor, pool: int) -> Tensor:
    """Return relu(max_pool(x)), float [B, C, H // pool, W // pool]; max and ReLU commute, values and gradients.

    After pooling ReLU has a quarter of the work. Without a gradient nobody asks for the index of every winner, which
    torch's max-pool finds on the way and which costs more than all the rest: the same bits come from comparing twice.
    """
    if pool == 1:
        return torch.relu(x_BCHW)
    if pool == 2 and not torch.is_grad_enabled():
        height, width = (size // 2 * 2 for size in x_BCHW.shape[2:])
        rows = torch.maximum(x_BCHW[:, :, 0:height:2, :width], x_BCHW[:, :, 1:height:2, :width])
        return torch.maximum(rows[..., ::2], rows[..., 1::2]).relu_()
    return torch.relu(F.max_pool2d(x_BCHW, pool))


def norm_can_wait(x_BCHW: Tensor, weight_C: Tensor) -> bool:
    """Return whether `pooled_norm` gives what norm and pool give, and sooner.

    The order can change where every factor is positive. Large channels-last activations on a CPU are where it pays.
    """
    large = x_BCHW.shape[2] * x_BCHW.shape[3] >= MIN_FUSED_PIXELS
    if x_BCHW.device.type != "cpu" or not large or x_BCHW.is_contiguous() or not torch.is_grad_enabled():
        return False
    return bool((weight_C > 0).all())


def pooled_norm(x_BCHW: Tensor, norm: torch.nn.BatchNorm2d, pool: int) -> Tensor:
    """Return relu(max_pool(batch_norm(x))) with batch statistics, updating the running ones.

    A positive factor leaves the order of a channel: its largest value can be taken before the norm, which
    then has 1 / pool**2 of the work. Backward, the norm's sums are sums over the winners, and what it takes from every
    value is one linear function of the value: dL/dx = a g - a (sum(g) + x_hat sum(g x_hat)) / n with a = weight / sd.
    Source: Ioffe and Szegedy 2015, section 3.

    Args:
        x_BCHW: The convolution's output.
        norm: With positive factors (`norm_can_wait`).
        pool: Size of a window, 1 or more.
    """
    out: Tensor = _PooledNorm.apply(
        x_BCHW, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps, pool
    )  # type: ignore[no-untyped-call]
    return out


class _PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        running_mean_C: Tensor,
        running_var_C: Tensor,
        momentum: float,
        eps: float,
        pool: int,
    ) -> Tensor:
        mean_C, var_C = torch.batch_norm_update_stats(x_BCHW, running_mean_C, running_var_C, momentum)
        per_sd_C = torch.rsqrt(var_C + eps)
        largest, winner = F.max_pool2d(x_BCHW, pool, return_indices=True)
        factor_C = weight_C * per_sd_C
        out = torch.addcmul(_wide(bias_C - mean_C * factor_C), largest, _wide(factor_C)).relu_()
        ctx.save_for_backward(x_BCHW, largest, winner, out, weight_C, mean_C, per_sd_C)
        ctx.pool = pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, largest, winner, out, weight_C, mean_C, per_sd_C = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        to_bias_C = gradient.sum((0, 2, 3))
        to_weight_C = (gradient * ((largest - _wide(mean_C)) * _wide(per_sd_C))).sum((0, 2, 3))
        factor_C = weight_C * per_sd_C
        per_value = x_BCHW.shape[1] / x_BCHW.numel()
        slope_C = -factor_C * per_sd_C * to_weight_C * per_value
        shift_C = -factor_C * to_bias_C * per_value - slope_C * mean_C
        window = [ctx.pool, ctx.pool]
        to_x = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient * _wide(factor_C), x_BCHW, window, window, [0, 0], [1, 1], False, winner
        )
        to_x.addcmul_(x_BCHW, _wide(slope_C)).add_(_wide(shift_C))
        return to_x, to_weight_C, to_bias_C, None, None, None, None, None


def _wide(values_C: Tensor) -> Tensor:
    return values_C[:, None, None]
