from __future__ import annotations

import pytest
import torch

from esper.kasmina.gating import build_gate, gate_params
from esper.tolaria.runtime import keyed_initialisation


def built(topology: str, channels: int) -> torch.nn.Module:
    with keyed_initialisation("gate", topology, channels):
        return build_gate(topology, channels)


def activation(topology: str, channels: int, scale: float = 1.0) -> torch.Tensor:
    shape = (3, channels, 4, 4) if topology == "cnn" else (3, 5, channels)
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [4, 8, 64])
@pytest.mark.parametrize(("topology", "shape"), [("cnn", (3, 1, 1, 1)), ("transformer", (3, 5, 1))])
def test_a_gate_is_one_number_between_zero_and_one_per_image_or_token(topology, channels, shape):
    g = built(topology, channels)(activation(topology, channels, scale=10.0))
    assert g.shape == shape
    assert ((g > 0) & (g < 1)).all()
    assert g.unique().numel() == g.numel()


@pytest.mark.parametrize("channels", [1, 4, 8, 33, 64, 512])
@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_the_number_of_parameters_is_the_modules(topology, channels):
    assert gate_params(channels) == sum(p.numel() for p in built(topology, channels).parameters())


def test_the_published_gate_has_1057_parameters_at_64_channels():
    assert gate_params(64) == 1057


def test_the_gate_of_an_image_reads_the_mean_over_its_pixels_alone():
    gate, h_BCHW = built("cnn", 8), activation("cnn", 8)
    shuffled = h_BCHW.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(gate(shuffled.unflatten(2, (4, 4))), gate(h_BCHW))
    mean_BC = h_BCHW.mean(dim=(2, 3))
    first, last = gate.score[0], gate.score[2]
    hidden = torch.clamp(mean_BC @ first.weight.T + first.bias, min=0)
    expected = 1 / (1 + torch.exp(-(hidden @ last.weight.T + last.bias)))
    torch.testing.assert_close(gate(h_BCHW).flatten(1), expected)


def test_the_gate_of_a_token_sees_that_token_alone():
    gate, h_BTC = built("transformer", 8).double(), activation("transformer", 8).double()
    jacobian = torch.autograd.functional.jacobian(lambda h: gate(h[None])[0, :, 0], h_BTC[0])
    influence_TT = jacobian.abs().sum(dim=-1)
    assert torch.equal(influence_TT, torch.diag(influence_TT.diagonal()))
    assert (influence_TT.diagonal() > 0).all()


@pytest.mark.parametrize("topology", ["cnn", "transformer"])
def test_gradients_of_a_gate_agree_with_finite_differences(topology):
    gate, h = built(topology, 3).double(), activation(topology, 3).double().requires_grad_()
    names = [name for name, _ in gate.named_parameters()]

    def run(source, *values):
        return torch.func.functional_call(gate, dict(zip(names, values)), (source,))

    assert torch.autograd.gradcheck(run, (h, *[p.detach().clone().requires_grad_() for p in gate.parameters()]))
