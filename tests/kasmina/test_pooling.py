"""The short ways of batch norm and max-pool against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper.kasmina.hosts import BatchNorm
from esper.kasmina.hosts.pooling import max_pool_relu, norm_can_wait, pooled_norm


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def a_norm(channels: int, dtype: torch.dtype = torch.float32) -> BatchNorm:
    norm = BatchNorm(channels).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.2, 1.5, channels))
        norm.bias.copy_(torch.linspace(-0.5, 0.5, channels))
    return norm


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 8, 7, 5), (1, 1, 2, 3)])
def test_without_a_gradient_the_pool_has_the_same_bits_odd_sizes_and_ties_included(shape):
    x = images(*shape).mul(2).round()
    with torch.no_grad():
        assert torch.equal(max_pool_relu(x, 2), torch.relu(F.max_pool2d(x, 2)))
        assert torch.equal(max_pool_relu(x.contiguous(), 2), torch.relu(F.max_pool2d(x, 2)))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pool", [2, 3])
def test_the_norm_after_the_pool_gives_the_values_gradients_and_statistics_of_the_norm_before_it(dtype, within, pool):
    found = []
    for late in (True, False):
        norm, x = a_norm(8, dtype), images(6, 8, 16, 16, dtype=dtype).requires_grad_()
        assert norm_can_wait(x, norm.weight)
        out = pooled_norm(x, norm, pool) if late else torch.relu(F.max_pool2d(norm(x), pool))
        (out * torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        found.append([out, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    for ours, torchs in zip(*found):
        assert (ours - torchs).abs().max() <= within * torchs.abs().max()


@pytest.mark.parametrize("factor", [-0.1, 0.0, float("nan")])
def test_a_factor_that_is_not_positive_makes_the_norm_come_first(factor):
    norm, x = a_norm(8), images(6, 8, 16, 16)
    with torch.no_grad():
        norm.weight[3] = factor
    assert not norm_can_wait(x, norm.weight)
