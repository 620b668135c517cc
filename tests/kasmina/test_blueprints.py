from __future__ import annotations

import pytest
import torch

from esper.kasmina.blueprints import CNN_REGISTRY, build_blueprint, group_norm
from esper.leyline.actions import CNN_BLUEPRINTS
from esper.leyline.errors import UnknownNameError
from esper.tolaria.runtime import keyed_initialisation

SHAPES = [(4, 6), (8, 3), (16, 1), (64, 8)]


def born(name: str, channels: int, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    with keyed_initialisation("test", name, channels):
        module = build_blueprint(name, channels)
        x = torch.randn(16, channels, size, size).contiguous(memory_format=torch.channels_last)
    return module.to(memory_format=torch.channels_last), x


def test_the_registry_holds_the_eight_blueprints_of_the_action_tree():
    assert tuple(CNN_REGISTRY) == CNN_BLUEPRINTS


def test_an_unknown_blueprint_names_the_nearest():
    with pytest.raises(UnknownNameError, match="conv_heavy"):
        build_blueprint("conv_heavi", 4)


@pytest.mark.parametrize(("channels", "size"), SHAPES)
@pytest.mark.parametrize("name", CNN_BLUEPRINTS)
def test_a_seed_keeps_shape_and_is_exactly_the_identity_at_birth(name, channels, size):
    module, x = born(name, channels, size)
    increment = module(x)
    assert increment.shape == x.shape
    assert torch.equal(x + increment, x)


@pytest.mark.parametrize(("channels", "size"), [(4, 6), (8, 3), (64, 8)])
@pytest.mark.parametrize("name", CNN_BLUEPRINTS)
def test_the_gradient_at_birth_is_neither_dead_nor_explosive_and_one_step_moves_the_seed(name, channels, size):
    module, x = born(name, channels, size)
    source = x.detach().requires_grad_()
    out_gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(module(source), [*parameters, source], out_gradient, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients[:-1] if g is not None]).norm()
    assert 1e-3 <= float(norm / out_gradient.norm()) <= 1e2
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.sub_(0.1 * gradient / norm)
        assert float(module(x).abs().max()) > 0


@pytest.mark.parametrize("name", CNN_BLUEPRINTS)
def test_gradients_agree_with_finite_differences_in_double_precision(name):
    module, x = born(name, 4, 3)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = x[:3].double().contiguous().requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(source, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (source,))

    assert torch.autograd.gradcheck(run, (x, *[p.detach().clone().requires_grad_() for p in module.parameters()]))


def test_group_norm_keeps_at_least_sixteen_channels_in_a_group():
    assert [group_norm(c).num_groups for c in (4, 16, 32, 64, 512, 1024)] == [1, 1, 2, 4, 32, 32]


def test_group_norm_backward_survives_a_detached_channels_last_input():
    """The whole process dies where a detached input does not require grad."""
    module, x = born("norm", 8, 6)
    source = x.detach().requires_grad_()
    loss = module(source).square().sum() + module(source).sum()
    gradients = torch.autograd.grad(loss, [*module.parameters(), source])
    assert all(torch.isfinite(g).all() for g in gradients)
