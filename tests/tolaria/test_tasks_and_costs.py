from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_specs import tiny_environment

from esper.leyline.library import load
from esper.leyline.specs import DigitsTask, EnvironmentSpec
from esper.tolaria.cost import environment_costs, wider_factor
from esper.tolaria.executor import batch_order, own_pass, train_epoch
from esper.tolaria.lineage import Lineage, SeedKey, new_network
from esper.tolaria.runtime import single_thread
from esper.tolaria.tasks import load_task

GAP = load("environments", "digits-gap", EnvironmentSpec)


def test_digits_gap_has_the_sizes_and_the_host_of_the_design():
    data = load_task(GAP.task)
    assert [len(data.train), len(data.val), len(data.test)] == [2000, 1188, 4000]
    assert data.train.x_NCHW.shape[1:] == (1, 12, 12)
    assert environment_costs(GAP).num_params == 422


def test_no_source_image_is_in_two_splits():
    plain = load_task(DigitsTask(canvas=12, sources=(600, 300, 800)))

    def originals(split):
        images = []
        for x in split.x_NCHW[:, 0]:
            rows, columns = np.nonzero((x > x.min()).numpy())
            images.append(x[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].numpy().tobytes())
        return set(images)

    train, val, test = (originals(s) for s in (plain.train, plain.val, plain.test))
    assert len(train & test) + len(train & val) + len(val & test) == 0


def test_the_training_inputs_are_standardised_and_the_same_spec_gives_the_same_bytes():
    data = load_task(GAP.task)
    again = load_task.__wrapped__(GAP.task)
    assert float(data.train.x_NCHW.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.x_NCHW.std()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(data.test.x_NCHW, again.test.x_NCHW)
    assert torch.equal(data.test.y_N, again.test.y_N)


def test_batch_order_is_keyed_by_seed_and_epoch_and_never_repeats_a_row_within_a_round():
    lineage = Lineage("key", GAP, new_network(GAP, 5, load_task(GAP.task)))
    data = load_task(GAP.task)
    first = batch_order(lineage, data, 5, "order", 0)
    assert first.shape == (15, 128)
    assert len(first.unique()) == 15 * 128
    assert torch.equal(first, batch_order(lineage, data, 5, "order", 0))
    assert not torch.equal(first, batch_order(lineage, data, 5, "order", 1))
    assert not torch.equal(first, batch_order(lineage, data, 6, "order", 0))


def test_an_epoch_equals_a_textbook_loop():
    """Plain modules, autograd and SGD, written out: the same weights to 1e-5."""
    single_thread()
    spec = tiny_environment(batches_per_epoch=4)
    data = load_task(spec.task)
    lineage = Lineage("key", spec, new_network(spec, 5, data))
    twin = new_network(spec, 5, data).host
    order = batch_order(lineage, data, 5, "order", 0)
    lineage.begin_epoch(0)
    train_epoch(lineage, data, order)
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    twin.train()
    for index in order:
        h = data.train.x_NCHW[index]
        for block in twin.segments:
            h = F.max_pool2d(F.relu(block.norm(block.conv(h))), 2)
        loss = F.cross_entropy(twin.head(h.mean(dim=(2, 3))), data.train.y_N[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, expected in twin.state_dict().items():
        ours = lineage.network.host.state_dict()[name]
        if ours.dtype.is_floating_point:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_own_pass_trains_the_seed_with_the_gradient_of_a_frozen_suffix_in_double_precision():
    spec = tiny_environment(seed_gradient_clip=1e9, weight_decay=0.0, momentum=0.0)
    data = load_task(spec.task)
    lineage = Lineage("key", spec, new_network(spec, 5, data).double())
    incubation = lineage.incubate(SeedKey(0, 6, 1, 0, "own_pass"), 5, 4)
    incubation.module.double()
    incubation.module.scale.weight.data.fill_(0.3)
    x, y = data.train.x_NCHW[:32].double(), data.train.y_N[:32]
    lineage.network.train_mode(True)
    _, tapped = lineage.network.run(x, [0])
    host_before = [p.detach().clone() for p in lineage.network.parameters()]
    weight = incubation.module.scale.weight
    before = weight.detach().clone()

    def loss_at(value):
        weight.data.copy_(value)
        with torch.no_grad(), lineage.network.batch_statistics():
            h = tapped[0].detach()
            return float(F.cross_entropy(lineage.network.suffix(0, h + incubation.module(h)), y))

    expected = torch.zeros_like(before)
    for channel in range(4):
        bump = torch.zeros_like(before)
        bump[channel] = 1e-5
        expected[channel] = (loss_at(before + bump) - loss_at(before - bump)) / 2e-5
    weight.data.copy_(before)
    lineage.set_learning_rate(0.5)
    with lineage.network.batch_statistics():
        own_pass(lineage, incubation, tapped[0], y)
    torch.testing.assert_close((before - weight.detach()) / 0.5, expected, rtol=1e-5, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(host_before, lineage.network.parameters()))
    assert all(p.grad is None for p in lineage.network.parameters())


def test_operations_are_counted_as_twice_the_multiply_adds():
    costs = environment_costs(GAP)
    conv = [2 * 9 * 4 * 144, 2 * 4 * 8 * 36, 2 * 8 * 16 * 9]
    assert list(costs.forward_by_segment) == conv
    assert costs.head_forward == 2 * 16 * 10
    assert costs.train_per_sample == 2 * conv[0] + 3 * conv[1] + 3 * conv[2] + 3 * costs.head_forward


def test_the_wider_host_costs_at_least_the_target_and_barely_more():
    samples = GAP.batch_size * GAP.batches_per_epoch
    target = 4.0 * samples * environment_costs(GAP).train_per_sample
    factor = wider_factor(GAP, target)
    wide = GAP.model_copy(update={"host": GAP.host.model_copy(update={"width_factor": factor})})
    assert 1.0 <= environment_costs(wide).train_per_sample * samples / target < 1.3
    assert wider_factor(GAP, 1.0) == 1.0
