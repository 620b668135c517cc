from __future__ import annotations

import itertools

import pytest
import torch

from esper.kasmina.blending import alpha_at
from esper.kasmina.hosts import DataShape, Host, build_host
from esper.kasmina.lifecycle import SeedKey, SlotState, advance, fossilize, germinate, prune, tick
from esper.kasmina.network import Graft, Network
from esper.leyline.actions import Blend
from esper.leyline.errors import LifecycleError
from esper.leyline.specs import CnnHost
from esper.leyline.stages import Stage
from esper.tolaria.runtime import keyed_initialisation


def host_of(in_channels=1, resolution=12, **changes) -> Host:
    fields = {"channels": (4, 8, 16), "kernels": (3, 1, 1), "pools": (2, 2, 2)} | changes
    with keyed_initialisation("host"):
        return build_host(
            CnnHost(**fields), DataShape(kind="image", channels=in_channels, resolution=resolution, num_classes=10)
        )


def test_a_narrowed_block_passes_only_its_first_channels():
    host = host_of(narrowed=(0, 2, 0))
    out = host.segment(1, torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert out[:, 2:].abs().max() == 0
    assert out[:, :2].abs().max() > 0


def test_a_frozen_block_trains_no_convolution():
    host = host_of(frozen=(False, True, False))
    assert [block.conv.weight.requires_grad for block in host.segments] == [True, False, True]


def test_places_tell_what_lies_before_each_slot():
    places = host_of(pools=(2, 1, 1), narrowed=(1, 0, 0)).places
    assert [(p.channels, p.resolution, p.kernel, p.narrowed) for p in places] == [
        (4, 6, 3, 1),
        (8, 6, 1, 0),
        (16, 6, 1, 0),
    ]


def test_probing_batch_norms_use_batch_statistics_and_leave_the_running_ones_alone():
    network = Network(host_of())
    x = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    network.train_mode(False)
    before = [norm.running_mean.clone() for norm in network._norms]
    with torch.no_grad(), network.batch_statistics():
        probed, _ = network.run(x)
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(network._norms, before))
    network.train_mode(True)
    with torch.no_grad():
        trained, _ = network.run(x)
    assert torch.equal(probed, trained)


def test_an_isolated_graft_lets_no_gradient_through_its_input_and_a_coadapting_one_does():
    module = torch.nn.Conv2d(4, 4, 1, bias=False)
    h = torch.ones(1, 4, 2, 2, requires_grad=True)
    identity = torch.autograd.grad(Graft(module, 0.5, isolated=True, fossil=False).apply(h).sum(), h)[0]
    through = torch.autograd.grad(Graft(module, 0.5, isolated=False, fossil=False).apply(h).sum(), h)[0]
    assert torch.equal(identity, torch.ones_like(h))
    assert not torch.equal(through, identity)


@pytest.mark.parametrize("blend", [b for b in Blend if b is not Blend.GATED])
@pytest.mark.parametrize("total", [3, 5, 8, 12])
def test_alpha_rises_monotonically_to_exactly_one(blend, total):
    values = [alpha_at(blend, k, total) for k in range(total + 3)]
    assert values[0] == 0
    assert values[total] == values[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(values[: total + 1]))


def test_a_sigmoid_of_steepness_one_is_symmetric_and_sharper_than_a_gentle_one():
    assert alpha_at(Blend.SIGMOID, 4, 8) == pytest.approx(0.5)
    assert alpha_at(Blend.SIGMOID_DOUBLE, 2, 8) < alpha_at(Blend.SIGMOID, 2, 8) < alpha_at(Blend.SIGMOID_HALF, 2, 8)


def live_slot() -> SlotState:
    return germinate(SlotState(), SeedKey(0, 7, 1, 2, "own_pass", 2), (0, 0, 0, 1), 0.5)


def test_a_life_from_birth_to_commitment():
    slot = tick(live_slot(), 0.5)
    assert (slot.stage, slot.epochs_in_stage) == (Stage.TRAINING, 1)
    slot = advance(slot, 0.5)
    for _ in range(2):
        slot = tick(slot, 0.5)
        assert slot.stage is Stage.BLENDING
    slot = tick(slot, 0.6)
    assert (slot.stage, slot.epochs_in_stage, slot.stage_start_accuracy) == (Stage.HOLDING, 0, 0.6)
    slot = fossilize(slot, 0.6)
    assert tick(slot, 0.6).stage is Stage.FOSSILIZED
    with pytest.raises(LifecycleError, match="terminal"):
        prune(slot)


def test_a_pruned_slot_is_free_again_after_seven_epochs():
    slot = prune(live_slot())
    stages = []
    for _ in range(7):
        slot = tick(slot, 0.5)
        stages.append(slot.stage)
    assert stages == [Stage.EMBARGOED] * 5 + [Stage.RESETTING, Stage.DORMANT]
    assert slot == SlotState()


def test_a_training_seed_cannot_be_committed():
    with pytest.raises(LifecycleError, match="TRAINING -> FOSSILIZED"):
        fossilize(live_slot(), 0.5)
