from __future__ import annotations

import pytest
import torch
from blueprint_cases import ALL, born, check_birth
from torch import nn

from esper.kasmina.blueprints import REGISTRIES, build_blueprint
from esper.kasmina.blueprints.cnn import group_norm
from esper.kasmina.blueprints.transformer import num_heads
from esper.leyline.actions import CNN_BLUEPRINTS, TRANSFORMER_BLUEPRINTS
from esper.leyline.errors import UnknownNameError


def perturbed(topology: str, name: str, channels: int, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A seed away from its zero, in double precision."""
    module, x = born(topology, name, channels, size)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return module, x.double().contiguous()


def test_the_registries_hold_the_blueprints_of_the_action_tree_in_its_order():
    assert tuple(REGISTRIES["cnn"]) == CNN_BLUEPRINTS
    assert tuple(REGISTRIES["transformer"]) == TRANSFORMER_BLUEPRINTS


def test_an_unknown_blueprint_names_the_nearest():
    with pytest.raises(UnknownNameError, match="conv_heavy"):
        build_blueprint("cnn", "conv_heavi", 4)
    with pytest.raises(UnknownNameError, match="lora_large"):
        build_blueprint("transformer", "lora_larg", 4)


@pytest.mark.parametrize(("channels", "size"), [(4, 6), (6, 2), (8, 3), (64, 8)])
@pytest.mark.parametrize(("topology", "name"), ALL)
def test_at_birth_a_seed_is_the_identity_its_gradient_is_sane_and_one_step_moves_it(topology, name, channels, size):
    check_birth(topology, name, channels, size)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(("topology", "name"), ALL)
def test_a_seed_keeps_the_shape_of_one_pixel_or_token_and_of_odd_sizes(topology, name, size):
    module, x = born(topology, name, 16, size)
    assert module(x).shape == x.shape
    assert torch.equal(x + module(x), x)


@pytest.mark.parametrize(("topology", "name"), ALL)
def test_no_statistics_are_carried_from_batch_to_batch_and_no_row_sees_another(topology, name):
    module, x = perturbed(topology, name, 8, 5)
    assert not list(module.buffers())
    alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(module(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMER_BLUEPRINTS)
def test_a_token_sees_no_later_token(name):
    module, x_BTC = perturbed("transformer", name, 8, 6)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x[None])[0].sum(dim=-1), x_BTC[0])
    influence_TT = jacobian.abs().sum(dim=-1)  # output token x input token
    assert torch.equal(influence_TT.triu(1), torch.zeros(6, 6, dtype=torch.float64))
    assert (influence_TT.diagonal() > 0).all()
    mixes = (influence_TT.tril(-1) > 0).any()
    assert mixes == (name in ("attention", "conv"))


@pytest.mark.parametrize(("topology", "name"), ALL)
def test_gradients_agree_with_finite_differences_in_double_precision(topology, name):
    module, x = perturbed(topology, name, 4, 3)
    x = x[:2].requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(source, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (source,))

    assert torch.autograd.gradcheck(run, (x, *[p.detach().clone().requires_grad_() for p in module.parameters()]))


def test_attention_equals_a_textbook_loop_over_tokens_and_heads():
    module, x_BTC = perturbed("transformer", "attention", 6, 4)
    heads, width = module.heads, 6 // module.heads
    query, key, value = module.query_key_value(module.norm(x_BTC)).chunk(3, dim=-1)
    expected = torch.zeros_like(x_BTC)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for token in range(4):
            scores = torch.stack([(query[:, token, part] * key[:, t, part]).sum(-1) for t in range(token + 1)], dim=-1)
            weights = torch.softmax(scores / width**0.5, dim=-1)
            for t in range(token + 1):
                expected[:, token, part] += weights[:, t, None] * value[:, t, part]
    torch.testing.assert_close(module(x_BTC), module.out(expected))


def test_the_causal_convolution_equals_a_textbook_loop():
    module, x_BTC = perturbed("transformer", "conv", 4, 6)
    seen = module.norm(x_BTC)
    out = torch.zeros_like(x_BTC)
    for token in range(6):
        for back in range(4):
            if token - back >= 0:
                out[:, token] += seen[:, token - back] * module.depthwise.weight[:, 0, 3 - back]
    expected = module.out(nn.functional.silu(out + module.depthwise.bias))
    torch.testing.assert_close(module(x_BTC), expected)


def test_attention_heads_divide_the_width():
    assert [num_heads(channels) for channels in (1, 2, 3, 5, 6, 8, 64, 384)] == [1, 2, 3, 1, 3, 4, 4, 4]


def test_group_norm_keeps_at_least_sixteen_channels_in_a_group():
    assert [group_norm(c).num_groups for c in (4, 16, 32, 64, 512, 1024)] == [1, 1, 2, 4, 32, 32]


@pytest.mark.parametrize("name", CNN_BLUEPRINTS)
def test_the_backward_of_a_detached_channels_last_input_is_finite(name):
    """The whole process dies in GroupNorm's backward where nobody asks for the gradient of a channels_last input."""
    module, x = born("cnn", name, 32, 6)
    source = x.detach().requires_grad_()
    assert source.is_contiguous(memory_format=torch.channels_last)
    (module(source).square().sum() + module(source).sum()).backward()
    gradients = [source.grad, *(p.grad for p in module.parameters())]
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
