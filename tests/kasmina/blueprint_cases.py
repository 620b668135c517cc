"""The birth test of a blueprint: what every seed must do when it is born, whatever it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints import build_blueprint
from esper.leyline.host_specs import BLUEPRINTS, Topology
from esper.tolaria.runtime import keyed_initialisation

ALL = [(topology, name) for topology, names in BLUEPRINTS.items() for name in names]
ROWS = 16


def born(topology: Topology, name: str, channels: int, size: int) -> tuple[nn.Module, Tensor]:
    """A seed and an activation: `size` is the width of an image, or the number of tokens."""
    with keyed_initialisation("test", name, channels):
        module = build_blueprint(topology, name, channels)
        if topology == "transformer":
            return module, torch.randn(ROWS, size, channels)
        x_BCHW = torch.randn(ROWS, channels, size, size).contiguous(memory_format=torch.channels_last)
    return module.to(memory_format=torch.channels_last), x_BCHW


def check_birth(topology: Topology, name: str, channels: int, size: int) -> None:
    """Identity at birth, a gradient that is neither dead nor explosive, and one step moves it."""
    module, x = born(topology, name, channels, size)
    increment = module(x)
    assert increment.shape == x.shape
    assert torch.equal(x + increment, x)
    source = x.detach().requires_grad_()
    out_gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(module.parameters())
    # The input's gradient is asked for too: GroupNorm's backward kills the process where a channels_last one is not.
    *gradients, _ = torch.autograd.grad(module(source), [*parameters, source], out_gradient, allow_unused=True)
    norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    assert 1e-3 <= float(norm / out_gradient.norm()) <= 1e2
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None:
                parameter.sub_(0.1 * gradient / norm)
        assert float(module(x).abs().max()) > 0
