from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_specs import tiny_environment

from esper.leyline.library import load
from esper.leyline.specs import DigitsTask, EnvironmentSpec
from esper.tolaria.cost import environment_costs
from esper.tolaria.executor import batch_order, train_epoch
from esper.tolaria.lineage import Lineage, new_network
from esper.tolaria.runtime import single_thread
from esper.tolaria.tasks import load_task
from esper.tolaria.tasks.digits import load_digits_task

GAP = load("environments", "digits-gap", EnvironmentSpec)


def test_digits_gap_has_the_sizes_and_the_host_of_the_design():
    data = load_task(GAP.task)
    assert [len(data.train), len(data.val), len(data.test)] == [2000, 1188, 4000]
    assert data.train.inputs.shape[1:] == (1, 12, 12)
    assert environment_costs(GAP).num_params == 422


def test_no_source_image_is_in_two_splits():
    plain = load_task(DigitsTask(canvas=12, sources=(600, 300, 800)))

    def originals(split):
        images = []
        for x in split.inputs[:, 0]:
            rows, columns = np.nonzero((x > x.min()).numpy())
            images.append(x[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].numpy().tobytes())
        return set(images)

    train, val, test = (originals(s) for s in (plain.train, plain.val, plain.test))
    assert len(train & test) + len(train & val) + len(val & test) == 0


def test_the_training_inputs_are_standardised_and_the_same_spec_gives_the_same_bytes():
    data = load_task(GAP.task)
    again = load_digits_task(GAP.task)
    assert float(data.train.inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(data.test.inputs, again.test.inputs)
    assert torch.equal(data.test.labels, again.test.labels)


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
    train_epoch(lineage, data, 5, 0)
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    twin.train()
    for index in order:
        h = data.train.inputs[index]
        for block in twin.segments:
            h = F.max_pool2d(F.relu(block.norm(block.conv(h))), 2)
        loss = F.cross_entropy(twin.head(h.mean(dim=(2, 3))), data.train.labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, expected in twin.state_dict().items():
        ours = lineage.network.host.state_dict()[name]
        if ours.dtype.is_floating_point:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
