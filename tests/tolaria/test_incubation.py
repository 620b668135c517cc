"""Seeds that learn beside the host: their gradients, what they leave alone, and what keeps the linearised ones sane."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oracles.small_tasks import (
    ENV_SEED,
    IMAGE,
    TEXT,
    blend,
    environment,
    incubate,
    random_data,
    shake,
    small_lineage,
)
from oracles.textbook import TextbookSeed, forward, linearised_gradients, mean_loss, own_pass_gradients

from esper.kasmina.network import Graft
from esper.tolaria import incubation as incubation_module
from esper.tolaria.executor import SerialExecutor, train_epoch
from esper.tolaria.incubation import INCREMENT_CAP, LINEARISED_EPOCHS, linearised, own_pass
from esper.tolaria.lineage import Lineage, new_gate, new_seed

WAYS = ("own_pass", "linearised")
KINDS = {"cnn": IMAGE, "transformer": TEXT}
HEAVY = 7


def double_lineage(kind: dict) -> tuple[Lineage, torch.Tensor, torch.Tensor]:
    """A lineage in double precision and one batch."""
    spec = environment(kind)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    lineage.network.double()
    lineage.network.train_mode(True)
    if kind is TEXT:  # a stream of size 1, so that an increment of shaken weights is within its cap
        lineage.network.host.embedding.token.weight.data *= 50
    inputs = data.train.inputs[:8]
    return lineage, inputs.double() if inputs.is_floating_point() else inputs, data.train.labels[:8]


def engine_gradients(lineage, its, inputs, labels) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the executor computes for a seed on one batch: own loss or linear drop, and gradients."""
    logits, tapped = lineage.network.run(inputs, [its.key.slot])
    h = tapped[its.key.slot]
    h.retain_grad()
    mean_loss(logits, labels).backward()
    with lineage.network.batch_statistics():
        if its.key.incubation == "linearised":
            value = linearised(its, h, needs_gradient=True)
        else:
            value = own_pass(lineage, its, h, labels)
    return value, [p.grad for p in its.module.parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blueprint", range(8))
@pytest.mark.parametrize("topology", KINDS)
def test_the_gradients_are_those_of_the_loss_written_out_in_double_precision(topology, blueprint, way):
    lineage, inputs, labels = double_lineage(KINDS[topology])
    its = incubate(lineage, 0, blueprint, way)
    its.module.double()
    host = copy.deepcopy(lineage.network.host).train()
    seed = TextbookSeed(0, copy.deepcopy(its.module), incubation=way)
    logits, arrived = forward(host, [], inputs)
    if way == "linearised":
        (pull,) = torch.autograd.grad(mean_loss(logits, labels), arrived[0])
        expected = linearised_gradients(seed, arrived[0], pull, INCREMENT_CAP)
    else:
        expected = own_pass_gradients(host, [], seed, arrived[0], labels)
    value, gradients = engine_gradients(lineage, its, inputs, labels)
    torch.testing.assert_close(value, expected[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-8, atol=1e-10)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-6


def bumped_slope(weight: torch.Tensor, place: int, objective) -> float:
    """Central difference of an objective in one entry of a weight."""
    flat = weight.data.view(-1)
    start = float(flat[place])
    values = []
    for step in (1e-6, -1e-6):
        flat[place] = start + step
        with torch.no_grad():
            values.append(float(objective()))
    flat[place] = start
    return (values[0] - values[1]) / 2e-6


@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_equal_finite_differences(way):
    lineage, inputs, labels = double_lineage(IMAGE)
    its = incubate(lineage, 0, HEAVY, way)
    its.module.double()
    logits, tapped = lineage.network.run(inputs, [0])
    (pull,) = torch.autograd.grad(mean_loss(logits, labels), tapped[0])
    h = tapped[0].detach()

    def objective():
        if way == "linearised":
            return (pull * its.module(h)).sum()
        with lineage.network.batch_statistics():
            return F.cross_entropy(lineage.network.suffix(0, h + its.module(h)), labels)

    _, gradients = engine_gradients(lineage, its, inputs, labels)
    for weight, gradient in zip(its.module.parameters(), gradients):
        slope = bumped_slope(weight, 0, objective)
        assert float(gradient.reshape(-1)[0]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("topology", KINDS)
def test_a_gated_graft_has_the_gradients_of_its_formula_written_out(topology, isolated):
    """To seed, gate and activation; where it is isolated the activation's is the identity path's alone."""
    lineage, inputs, _ = double_lineage(KINDS[topology])
    its = incubate(lineage, 0, HEAVY)
    gate = new_gate(lineage.spec, its.key, ENV_SEED, lineage.network.host.places[0].channels).double()
    shake(gate, 9)
    graft = Graft(its.module.double(), 0.4, isolated, fossil=False, gate=gate)
    h = lineage.network.host.segment(0, inputs).detach().requires_grad_()
    mine = [*graft.parameters(), h]
    pull = torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.autograd.grad((pull * graft.apply(h)).sum(), mine)

    def score(pooled):
        first, second = gate.score[0], gate.score[2]
        return torch.sigmoid(torch.relu(pooled @ first.weight.T + first.bias) @ second.weight.T + second.bias)

    seen = h.detach() if isolated else h
    pooled = seen.mean(dim=(2, 3)) if topology == "cnn" else seen
    g = score(pooled)[:, :, None, None] if topology == "cnn" else score(pooled)
    theirs = torch.autograd.grad((pull * (h + 0.4 * g * its.module(seen.requires_grad_()))).sum(), mine)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert torch.equal(ours[-1], pull) == isolated
    assert float(ours[-2].abs().max()) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "blueprint"),
    [*((IMAGE, blueprint) for blueprint in range(8)), (TEXT, 3), (TEXT, 7)],
    ids=lambda value: value["host"]["kind"] if isinstance(value, dict) else str(value),
)
def test_the_host_is_bit_for_bit_what_it_would_be_without_seeds_in_every_slot(kind, blueprint, way):
    changes = {"host": {"dropout": 0.3}} if kind is TEXT else {"augment": "crop-flip"}
    spec = environment(kind, **changes)
    data = random_data(spec)
    bare, carrying = small_lineage(spec, data), small_lineage(spec, data)
    seeds = [incubate(carrying, slot, blueprint, way) for slot in (0, 1)]
    starts = [[p.detach().clone() for p in its.module.parameters()] for its in seeds]
    for epoch in range(4):
        SerialExecutor().run_epoch([bare, carrying], data, ENV_SEED, epoch)
    assert bare.history == carrying.history
    assert bare.host_weight_change == carrying.host_weight_change > 0
    ours, theirs = carrying.network.host.state_dict(), bare.network.host.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(carrying.network.host.parameters(), bare.network.host.parameters()):
        momentum = [lineage.optimiser.state[p]["momentum_buffer"] for lineage, p in ((carrying, mine), (bare, other))]
        assert torch.equal(*momentum)
    for its, start in zip(seeds, starts):
        assert all(not torch.equal(a, b) for a, b in zip(its.module.parameters(), start))
        assert math.isfinite(its.measures.val_loss_drop)


@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_seeds_learn_as_each_would_alone(way):
    spec = environment(IMAGE)
    data = random_data(spec)
    together = small_lineage(spec, data)
    seeds = [incubate(together, slot, blueprint, way) for slot in (0, 1) for blueprint in (1, HEAVY)]
    train_epoch(together, data, ENV_SEED, 0)
    for its in seeds:
        lineage = small_lineage(spec, data)
        alone = incubate(lineage, its.key.slot, its.key.blueprint, way)
        train_epoch(lineage, data, ENV_SEED, 0)
        assert all(torch.equal(a, b) for a, b in zip(its.module.parameters(), alone.module.parameters()))
        assert its.measures == alone.measures


def test_a_seed_that_has_not_started_is_left_as_it_was_born():
    spec = environment(IMAGE)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    waiting = incubate(lineage, 0, HEAVY, start=-1)
    before = copy.deepcopy(waiting.module.state_dict())
    SerialExecutor().run_epoch([lineage], data, ENV_SEED, 0)
    assert all(torch.equal(before[name], value) for name, value in waiting.module.state_dict().items())
    assert math.isnan(waiting.measures.train_loss_drop)
    assert math.isnan(waiting.measures.val_loss_drop)
    assert waiting.cpu_s == 0


def test_the_weights_of_a_linearised_seed_stand_still_after_three_epochs_while_it_is_measured_on():
    spec = environment(IMAGE)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    its = incubate(lineage, 0, HEAVY, "linearised", start=2)
    weights, drops, norms = [], [], []
    for epoch in range(2, 7):
        before = [p.detach().clone() for p in its.module.parameters()]
        lineage.begin_epoch(epoch)
        train_epoch(lineage, data, ENV_SEED, epoch)
        weights.append(any(not torch.equal(a, b) for a, b in zip(before, its.module.parameters())))
        drops.append(its.measures.train_loss_drop)
        norms.append(its.measures.gradient_norm)
    assert LINEARISED_EPOCHS == 3
    assert weights == [True, True, True, False, False]
    assert len(set(drops)) == len(set(norms)) == 5
    assert all(norm > 0 for norm in norms)


def test_samples_beyond_the_cap_give_no_gradient_and_count_in_the_estimate():
    lineage, inputs, _ = double_lineage(IMAGE)
    its = incubate(lineage, 0, HEAVY, "linearised")
    its.module.double()
    h = lineage.network.host.segment(0, inputs).detach()
    with torch.no_grad():
        ratios = its.module(h).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)
        its.module.scale.weight *= INCREMENT_CAP / ratios.median()
        ratios *= INCREMENT_CAP / ratios.median()
    within = ratios <= INCREMENT_CAP
    assert 0 < int(within.sum()) < len(h)

    def gradients(rows):
        part = h[rows].clone().requires_grad_()
        part.grad = torch.ones_like(part)
        drop = linearised(its, part, needs_gradient=True)
        return drop, [p.grad.clone() for p in its.module.parameters()]

    everything, inside, outside = (gradients(rows) for rows in (slice(None), within, ~within))
    torch.testing.assert_close(everything[1], inside[1], rtol=1e-9, atol=1e-12)
    assert all(float(gradient.abs().max()) == 0 for gradient in outside[1])
    torch.testing.assert_close(everything[0], inside[0] + outside[0])
    assert float(outside[0]) != 0


def test_the_cap_keeps_an_increment_from_growing_without_end(monkeypatch):
    def usual_increment(cap: float) -> float:
        monkeypatch.setattr(incubation_module, "INCREMENT_CAP", cap)
        spec = environment(IMAGE, learning_rate=1.0, batches_per_epoch=30)
        data = random_data(spec)
        lineage = small_lineage(spec, data)
        lineage.set_learning_rate(1.0)
        its = incubate(lineage, 0, HEAVY, "linearised")
        for epoch in range(3):
            train_epoch(lineage, data, ENV_SEED, epoch)
        with torch.no_grad():
            h = lineage.network.run(data.train.inputs, [0])[1][0]
            return float((its.module(h).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)).median())

    capped, free = usual_increment(INCREMENT_CAP), usual_increment(math.inf)
    assert 10 * capped < free


def test_a_gate_is_keyed_like_its_seed_and_trained_clipped_committed_and_removed_with_it():
    spec = environment(IMAGE)
    data = random_data(spec)
    lineages = [small_lineage(spec, data) for _ in range(2)]
    for lineage in lineages:
        blend(lineage, 0, HEAVY, "coadapt", "gated")
    ours, again = (lineage.network.grafts[0].gate for lineage in lineages)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    lineage = lineages[0]
    graft, seed = lineage.network.grafts[0], lineage.seeds[0]
    alone = sum(p.numel() for p in new_seed(spec, seed.key, ENV_SEED, 4).parameters())
    assert seed.num_params == alone + sum(p.numel() for p in ours.parameters())
    child = lineage.fork("child", set())
    child.begin_epoch(0)
    train_epoch(child, data, ENV_SEED, 0)
    twin = child.network.grafts[0]
    assert not any(torch.equal(a, b) for a, b in zip(twin.parameters(), graft.parameters()))
    child.commit(0)
    assert [group["lr_factor"] for group in child.optimiser.param_groups] == [1.0, 1.0, 1.0]
    assert twin.gate is not None
    assert all("momentum_buffer" in child.optimiser.state[p] for p in twin.gate.parameters())
    child.remove(0)
    assert len(child.optimiser.param_groups) == 1
    assert set(child.optimiser.state) == set(child.network.host.parameters())
