"""An epoch of the executor against the same epoch written out, weight by weight."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles.small_tasks import ENV_SEED, IMAGE, TEXT, blend, environment, incubate, random_data, small_lineage
from oracles.textbook import HandSgd, TextbookEpoch, TextbookSeed

from esper.leyline.actions import SEED_LR_FACTORS
from esper.tolaria.augment import augment
from esper.tolaria.executor import batch_order, train_epoch
from esper.tolaria.lineage import Lineage
from esper.tolaria.runtime import torch_generator

HEAVY, ATTENTION = 7, 1


def written_out(lineage: Lineage, **changes: object) -> TextbookEpoch:
    """A copy of the lineage's networks, to be trained by hand."""
    twin = copy.deepcopy(lineage)
    seeds = []
    for slot, graft in twin.network.grafts.items():
        factor = SEED_LR_FACTORS[twin.seeds[slot].key.seed_lr]
        seeds.append(TextbookSeed(slot, graft.module, factor, graft.alpha, graft.isolated, graft.gate))
    for key, incubation in twin.incubations.items():
        factor = SEED_LR_FACTORS[key.seed_lr]
        seeds.append(TextbookSeed(key.slot, incubation.module, factor, incubation=key.incubation))
    spec = lineage.spec
    return TextbookEpoch(
        host=twin.network.host.train(),
        seeds=seeds,
        optimiser=HandSgd(spec.learning_rate, spec.momentum, spec.weight_decay),
        clip=spec.seed_gradient_clip,
        dropout=twin.network.host.set_dropout,
        **changes,
    )


def compare(spec, build, epochs: int = 2) -> Lineage:
    """Run both for some epochs; every weight, running statistic, loss drop and velocity must agree."""
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    build(lineage)
    lineage.begin_epoch(0)
    book = written_out(lineage)
    for epoch in range(epochs):
        lineage.begin_epoch(epoch)
        alphas = {slot: graft.alpha for slot, graft in lineage.network.grafts.items()}
        for seed in book.seeds:
            seed.alpha = alphas.get(seed.slot, 0.0)
        span = spec.host_frozen_epochs
        book.held_still = span is not None and span[0] <= epoch < span[1]
        batches = []
        for position, index in enumerate(batch_order(lineage, data, ENV_SEED, "order", epoch)):
            x = data.train.inputs[index]
            if spec.augment == "crop-flip":
                x = augment(x, torch_generator(ENV_SEED, "augment", epoch, position))
            batches.append((x, data.train.labels[index]))
        train_epoch(lineage, data, ENV_SEED, epoch)
        drops = book.run(iter(batches), torch_generator(ENV_SEED, "dropout", epoch))
        measured = [incubation.measures.train_loss_drop for incubation in lineage.incubations.values()]
        torch.testing.assert_close(measured, list(drops.values()), rtol=1e-4, atol=1e-5)
    for name, expected in book.host.state_dict().items():
        torch.testing.assert_close(lineage.network.host.state_dict()[name], expected, rtol=1e-5, atol=1e-5)
    modules = [
        *((graft.module, graft.gate) for graft in lineage.network.grafts.values()),
        *((incubation.module, None) for incubation in lineage.incubations.values()),
    ]
    assert len(modules) == len(book.seeds)
    for (module, gate), seed in zip(modules, book.seeds):
        ours = [*module.parameters(), *(gate.parameters() if gate is not None else ())]
        torch.testing.assert_close(ours, seed.parameters(), rtol=1e-5, atol=1e-5)
    return lineage


SEEDS = {
    "the host alone": lambda lineage: None,
    "an isolated and a co-adapting seed": lambda lineage: (
        blend(lineage, 0, HEAVY, "isolated"),
        blend(lineage, 1, ATTENTION, "coadapt"),
    ),
    "an isolated gated seed": lambda lineage: blend(lineage, 0, HEAVY, "isolated", "gated"),
    "a co-adapting gated seed and one in its own pass": lambda lineage: (
        blend(lineage, 0, HEAVY, "coadapt", "gated"),
        incubate(lineage, 1, ATTENTION),
    ),
    "own passes before a blended seed": lambda lineage: (
        incubate(lineage, 0, HEAVY),
        incubate(lineage, 0, ATTENTION),
        blend(lineage, 1, HEAVY, "coadapt"),
    ),
    "linearised seeds before a blended one": lambda lineage: (
        incubate(lineage, 0, HEAVY, "linearised"),
        incubate(lineage, 0, ATTENTION, "linearised"),
        blend(lineage, 1, HEAVY, "isolated"),
    ),
}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["image", "augmented image", "text", "text with dropout"])
def test_an_epoch_equals_the_textbook(kind, seeds):
    spec = {
        "image": environment(IMAGE),
        "augmented image": environment(IMAGE, augment="crop-flip"),
        "text": environment(TEXT),
        "text with dropout": environment(TEXT, host={"dropout": 0.3}),
    }[kind]
    compare(spec, SEEDS[seeds])


def test_a_host_held_still_equals_the_textbook_before_in_and_after_the_span():
    spec = environment(IMAGE, host_frozen_epochs=(1, 2))
    compare(spec, SEEDS["a co-adapting gated seed and one in its own pass"], epochs=3)


def test_augmentation_and_dropout_change_what_is_learnt():
    def losses(spec):
        data = random_data(spec)
        return train_epoch(small_lineage(spec, data), data, ENV_SEED, 0).train_loss

    plain, shifted = environment(IMAGE), environment(IMAGE, augment="crop-flip")
    dry, dropping = environment(TEXT), environment(TEXT, host={"dropout": 0.3})
    assert losses(plain) != losses(shifted)
    assert losses(dry) != losses(dropping)
    assert losses(dropping) == losses(dropping)


@pytest.mark.parametrize("optimiser", [{}, {"optimiser": "adam", "learning_rate": 0.01}])
def test_while_the_host_is_held_still_none_of_its_weights_moves_a_bit_and_seeds_train_on(optimiser):
    spec = environment(IMAGE, host_frozen_epochs=(1, 3), **optimiser)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    blend(lineage, 0, HEAVY, "coadapt", "gated")
    its = incubate(lineage, 1, HEAVY)

    def state():
        host = lineage.network.host
        own = [p.detach().clone() for p in host.parameters()]
        own += [copy.deepcopy(lineage.optimiser.state[p]) for p in host.parameters()]
        seeds = [p.detach().clone() for p in [*lineage.network.grafts[0].parameters(), *its.module.parameters()]]
        running = [norm.running_mean.clone() for norm in lineage.network._norms]
        return own, seeds, running

    def same(a, b):
        if isinstance(a, dict):
            return all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    moved = []
    before = state()
    for epoch in range(4):
        lineage.begin_epoch(epoch)
        train_epoch(lineage, data, ENV_SEED, epoch)
        after = state()
        moved.append([not all(same(a, b) for a, b in zip(x, y)) for x, y in zip(before, after)])
        assert all(not same(a, b) for a, b in zip(before[1], after[1]))
        before = after
    assert moved == [[True, True, True], [False, True, True], [False, True, True], [True, True, True]]


def test_a_bare_host_held_still_keeps_every_weight():
    spec = environment(IMAGE, host_frozen_epochs=(0, 1))
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    before = [p.detach().clone() for p in lineage.network.parameters()]
    train_epoch(lineage, data, ENV_SEED, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, lineage.network.parameters()))
    assert not lineage.non_finite


def test_the_span_is_no_part_of_the_warm_starts_clock():
    spec = environment(IMAGE, host_frozen_epochs=(0, 1))
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    before = [p.detach().clone() for p in lineage.network.parameters()]
    train_epoch(lineage, data, ENV_SEED, 0, "warm-")
    assert not any(torch.equal(a, b) for a, b in zip(before, lineage.network.parameters()))


@pytest.mark.parametrize("way", ["own_pass", "linearised", "isolated", "coadapt"])
def test_group_norm_on_a_channels_last_activation_survives_its_backward_pass(way):
    """Torch crashed the process where such an input did not require a gradient."""
    spec = environment(IMAGE, host={"channels": (16, 32)})
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    for slot in (0, 1):
        if way in ("own_pass", "linearised"):
            incubate(lineage, slot, 0, way)
        else:
            blend(lineage, slot, 0, way)
    lineage.begin_epoch(0)
    _, tapped = lineage.network.run(data.train.inputs, [0])
    assert tapped[0].is_contiguous(memory_format=torch.channels_last)
    assert train_epoch(lineage, data, ENV_SEED, 0).train_loss > 0
