from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from esper.kasmina.hosts import DataShape, KeyedDropout, SlotPlace, build_host, count_parameters
from esper.kasmina.network import Network
from esper.kasmina.torchvision_shim import import_torchvision
from esper.leyline.errors import SpecError
from esper.leyline.host_specs import CnnHost, ResNetHost, TransformerHost, slot_names
from esper.leyline.library import load_environment
from esper.tolaria.runtime import MIN_CHANNELS_LAST, keyed_initialisation, lay_out, single_thread

CIFAR = DataShape(kind="image", channels=3, resolution=32, num_classes=10)
STORIES = DataShape(kind="text", channels=1, resolution=256, num_classes=50_257)
SMALL_IMAGES = DataShape(kind="image", channels=3, resolution=9, num_classes=5)
SHORT_TEXT = DataShape(kind="text", channels=1, resolution=12, num_classes=31)

THIN_RESNET = ResNetHost(layers=18, width_factor=0.125)
TINY_DECODER = TransformerHost(layers=6, heads=2, embed=16, slots=3)


def cnn(channels, pools=(2, 2, 2), kernel=3):
    return CnnHost(channels=channels, kernels=(kernel,) * len(channels), pools=pools)


PUBLISHED = {
    "baseline": (cnn((64, 128, 256), (2, 2, 1)), 373_834),
    "wide": (cnn((128, 256, 512), (2, 2, 1)), 1_484_938),
    "deep": (cnn((64, 64, 128, 128, 256), (1, 2, 1, 2, 1)), 558_538),
    "proof of concept": (cnn((32, 64, 128)), 94_762),
    "cifar16-gap": (CnnHost(channels=(4, 8, 16), kernels=(3, 1, 1), pools=(2, 2, 2)), 494),
    "cifar_baseline": (cnn((8, 16, 32)), 6_418),
    "cifar_scale": (cnn((8, 16, 32, 64, 128), (2,) * 5), 99_922),
    "cifar_impaired": (cnn((1, 2, 4), kernel=1), 77),
    "cifar_minimal": (cnn((2, 4, 8), (1, 1, 1), kernel=1), 164),
    "cifar_deep_impaired": (cnn((2, 4, 8, 16, 32), (2,) * 5, kernel=1), 1_140),
    "cifar_highres": (cnn((16, 32, 64)), 24_346),
    "resnet18": (ResNetHost(layers=18), 11_173_962),
    "resnet34": (ResNetHost(layers=34), 21_282_122),
    "tinystories": (TransformerHost(), 30_044_544),
}


def host_of(spec, shape, key="host"):
    single_thread()
    with keyed_initialisation(key):
        return build_host(spec, shape)


def run(host, x):
    return Network(host).run(x)[0]


def images(rows=4, shape=SMALL_IMAGES):
    return torch.randn(rows, shape.channels, shape.resolution, shape.resolution, generator=seeded(0))


def tokens(rows=3, shape=SHORT_TEXT):
    return torch.randint(shape.num_classes, (rows, shape.resolution), generator=seeded(1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    spec, num_params = PUBLISHED[name]
    with torch.device("meta"):
        host = build_host(spec, STORIES if spec.topology == "transformer" else CIFAR)
    assert count_parameters(host) == num_params


SHIPPED = {
    **dict.fromkeys(("baseline", "fast-lr", "slow-lr", "adam", "small-batch", "large-batch"), 373_834),
    "wide": 1_484_938,
    "deep": 558_538,
    "resnet18": 11_173_962,
    **dict.fromkeys(("resnet34", "resnet34-adam", "resnet34-slow", "resnet34-small-batch"), 21_282_122),
    "cifar10": 94_762,
    "cifar10-deep": 99_922,
    **dict.fromkeys(("cifar-baseline", "cifar16-real", "cifar32-real"), 6_418),
    "cifar-impaired": 77,
    "cifar-minimal": 164,
    "cifar16-gap": 494,
    "tinystories": 30_044_544,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_hosts_of_the_environments_that_ship_have_the_published_sizes(name):
    environment = load_environment(name)
    resolution = getattr(environment.task, "resolution", None)
    shape = STORIES if resolution is None else dataclasses.replace(CIFAR, resolution=resolution)
    if shape is STORIES:
        assert (environment.task.context, environment.task.vocabulary) == (shape.resolution, shape.num_classes)
    with torch.device("meta"):
        assert count_parameters(build_host(environment.host, shape)) == SHIPPED[name]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (cnn((4,), (1,)), ("early",)),
        (cnn((4, 4), (1, 1)), ("early", "late")),
        (cnn((4, 8, 16)), ("early", "mid", "late")),
        (THIN_RESNET, ("early", "slot1", "mid", "late")),
        (cnn((4,) * 5, (1, 2, 1, 2, 1)), ("early", "slot1", "mid", "slot3", "late")),
        (TINY_DECODER, ("early", "mid", "late")),
        (TINY_DECODER.model_copy(update={"slots": 6}), ("early", "slot1", "slot2", "mid", "slot4", "late")),
    ],
)
def test_every_host_has_an_early_and_a_late_slot_and_with_three_or_more_a_mid_one(spec, names):
    assert slot_names(spec.num_slots) == names
    assert len(host_of(spec, SHORT_TEXT if spec.topology == "transformer" else SMALL_IMAGES).places) == len(names)


def test_layers_that_do_not_divide_into_the_slots_are_refused():
    with pytest.raises(SpecError, match="6 layers do not divide into 4 slots"):
        TransformerHost.parse({"slots": 4})


def test_torchvision_is_imported_only_where_a_host_or_a_task_needs_it():
    code = (
        "import sys, esper.tolaria.lineage; assert 'torchvision' not in sys.modules; "
        "import esper.kasmina.hosts.resnet; assert 'torchvision' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layers", [18, 34])
def test_resnet_segment_by_segment_is_torchvisions_network_with_the_cifar_stem(layers):
    reference = import_torchvision().models.__dict__[f"resnet{layers}"](num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    reference = reference.double().train()
    host = host_of(ResNetHost(layers=layers), CIFAR).double()
    host.load_state_dict(dict(zip(host.state_dict(), reference.state_dict().values(), strict=True)))
    x = images(3, DataShape(kind="image", channels=3, resolution=16, num_classes=10)).double()
    with torch.no_grad():
        for training in (True, False):
            host.train(training)
            reference.train(training)
            torch.testing.assert_close(run(host, x), reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(host.segments[0][0][1].running_mean, reference.bn1.running_mean, rtol=1e-10, atol=1e-10)


def textbook_decoder(weights, tokens_BT, layers, heads):
    """GPT-2 written out: one token at a time, one head at a time, softmax over itself and what came before."""
    names = iter(weights)

    def take(*shape):
        value = weights[next(names)]
        assert value.shape == shape
        return value

    def layer_norm(x, gain, bias):
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / torch.sqrt((deviation**2).mean(-1, keepdim=True) + 1e-5) * gain + bias

    width = next(iter(weights.values())).shape[1]
    each = width // heads
    token = take(len(next(iter(weights.values()))), width)
    x = token[tokens_BT] + take(tokens_BT.shape[1], width)
    for _ in range(layers):
        normed = layer_norm(x, take(width), take(width))
        qkv = normed @ take(3 * width, width).T + take(3 * width)
        mixed = torch.zeros_like(x)
        for row in range(len(x)):
            for head in range(heads):
                q, k, v = (qkv[row, :, p * width + head * each : p * width + (head + 1) * each] for p in range(3))
                for t in range(x.shape[1]):
                    scores = torch.stack([q[t] @ k[s] / each**0.5 for s in range(t + 1)])
                    shares = scores.exp() / scores.exp().sum()
                    mixed[row, t, head * each : (head + 1) * each] = shares @ v[: t + 1]
        x = x + mixed @ take(width, width).T + take(width)
        normed = layer_norm(x, take(width), take(width))
        hidden = normed @ take(4 * width, width).T + take(4 * width)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ take(width, 4 * width).T + take(width)
    return layer_norm(x, take(width), take(width)) @ token.T


def test_decoder_segment_by_segment_is_the_textbook_one():
    host = host_of(TINY_DECODER, SHORT_TEXT).double()
    for parameter in host.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(parameter.numel()), dtype=torch.float64) / 4
    with torch.no_grad():
        expected = textbook_decoder(host.state_dict(), tokens(2), layers=6, heads=2)
        torch.testing.assert_close(run(host, tokens(2)), expected, rtol=1e-10, atol=1e-10)


def test_a_token_changes_no_logits_before_it():
    host = host_of(TINY_DECODER, SHORT_TEXT)
    x = tokens()
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 31
    with torch.no_grad():
        before, after = run(host, x), run(host, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert bool((before[:, 7:] != after[:, 7:]).any(dim=-1).all())


def test_rows_may_be_shorter_than_the_context():
    host = host_of(TINY_DECODER, SHORT_TEXT)
    with torch.no_grad():
        torch.testing.assert_close(run(host, tokens()[:, :5]), run(host, tokens())[:, :5])


def test_an_untrained_decoder_starts_near_even_odds_and_its_residual_projections_start_smaller():
    host = host_of(TransformerHost(layers=4, heads=4, embed=64, slots=2), SHORT_TEXT)
    labels = torch.randint(31, (32, 12), generator=seeded(2))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(run(host, tokens(32)).flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(math.log(31), abs=0.1)
    block = host.segments[1][0]
    assert float(block.expand.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for last in (block.contract, block.attention.project):
        assert float(last.weight.detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert not bool(block.expand.bias.any())


def test_dropout_is_drawn_from_its_generator_alone_and_none_switches_it_off():
    host = host_of(TINY_DECODER, SHORT_TEXT)
    with torch.no_grad():
        plain = run(host, tokens())
        host.set_dropout(seeded(4))
        first, second = run(host, tokens()), run(host, tokens())
        host.set_dropout(seeded(4))
        torch.manual_seed(99)
        again = run(host, tokens())
        host.set_dropout(None)
        off = run(host, tokens())
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(plain, off)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    dropout = KeyedDropout(0.3)
    dropout.generator = seeded(0)
    out = dropout(torch.ones(400, 400))
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_a_copied_decoder_draws_the_same_dropout_and_keeps_its_tie():
    host = host_of(TINY_DECODER, SHORT_TEXT)
    host.set_dropout(seeded(4))
    twin = copy.deepcopy(host)
    with torch.no_grad():
        assert torch.equal(run(host, tokens()), run(twin, tokens()))
        twin.embedding.token.weight += 1
        host.set_dropout(None)
        twin.set_dropout(None)
        assert not torch.equal(run(host, tokens()), run(twin, tokens()))
    assert count_parameters(twin) == count_parameters(host)


def test_probing_a_resnet_leaves_every_running_statistic_alone_and_trains_like_batch_statistics():
    network = Network(host_of(THIN_RESNET, SMALL_IMAGES))
    assert len(network._norms) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 20
    network.train_mode(False)
    before = [norm.running_var.clone() for norm in network._norms]
    with torch.no_grad(), network.batch_statistics():
        probed, _ = network.run(images())
    assert all(torch.equal(norm.running_var, old) for norm, old in zip(network._norms, before))
    network.train_mode(True)
    with torch.no_grad():
        trained, _ = network.run(images())
    assert torch.equal(probed, trained)
    assert not any(torch.equal(norm.running_var, old) for norm, old in zip(network._norms, before))


@pytest.mark.parametrize(
    ("spec", "shape", "x"), [(THIN_RESNET, SMALL_IMAGES, images()), (TINY_DECODER, SHORT_TEXT, tokens())]
)
def test_taps_are_what_the_places_say_and_later_segments_leave_them_alone(spec, shape, x):
    host = host_of(spec, shape)
    slots = range(spec.num_slots)
    with torch.no_grad():
        logits, tapped = Network(host).run(x, slots)
        for slot, place in zip(slots, host.places, strict=True):
            text = shape.kind == "text"
            inner = (place.resolution, place.channels) if text else (place.channels, *(place.resolution,) * 2)
            assert tapped[slot].shape == (len(x), *inner)
            fresh = x
            for earlier in range(slot + 1):
                fresh = host.segment(earlier, fresh)
            torch.testing.assert_close(tapped[slot], fresh)
            torch.testing.assert_close(Network(host).suffix(slot, tapped[slot]), logits)


def test_places_of_a_resnet_tell_where_it_halves():
    places = host_of(THIN_RESNET, SMALL_IMAGES).places
    assert [(p.channels, p.resolution, p.pool) for p in places] == [(8, 9, 1), (16, 5, 2), (32, 3, 2), (64, 2, 2)]
    assert all((p.kernel, p.narrowed, p.frozen) == (3, 0, False) for p in places)
    place = SlotPlace(channels=16, resolution=12, kernel=0, pool=1, narrowed=0, frozen=False)
    assert host_of(TINY_DECODER, SHORT_TEXT).places == (place, place, place)


@pytest.mark.parametrize(("spec", "shape"), [(THIN_RESNET, SMALL_IMAGES), (TINY_DECODER, SHORT_TEXT)])
def test_the_same_key_gives_the_same_host_and_a_copy_is_its_own(spec, shape):
    first, second = host_of(spec, shape), host_of(spec, shape)
    other = host_of(spec, shape, key="other")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    twin = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("spec", "shape", "x"), [(THIN_RESNET, SMALL_IMAGES, images()), (TINY_DECODER, SHORT_TEXT, tokens())]
)
def test_every_parameter_learns(spec, shape, x):
    host = host_of(spec, shape)
    logits = run(host, x)
    labels = torch.arange(logits[..., 0].numel()) % shape.num_classes
    nn.functional.cross_entropy(logits.flatten(0, -2), labels).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in host.parameters())


def test_width_scales_every_layer():
    assert ResNetHost(layers=34, width_factor=0.5).stage_channels == (32, 64, 128, 256)
    assert cnn((4, 8, 16)).model_copy(update={"width_factor": 1.5}).block_channels == (6, 12, 24)
    assert TransformerHost(width_factor=0.51).embed_width == 198
    for spec, shape in ((THIN_RESNET, SMALL_IMAGES), (TINY_DECODER, SHORT_TEXT)):
        wider = spec.model_copy(update={"width_factor": 2 * spec.width_factor})
        narrow, wide = (host_of(s, shape) for s in (spec, wider))
        assert [p.channels for p in wide.places] == [2 * p.channels for p in narrow.places]
        assert wide.depth == narrow.depth


def test_only_wide_convolutions_are_laid_out_channels_last():
    host = lay_out(host_of(ResNetHost(layers=18, width_factor=0.0625), SMALL_IMAGES))
    for module in host.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 1 and module.kernel_size[0] > 1:
            channels_last = module.weight.stride()[1] == 1
            assert channels_last == (module.out_channels >= MIN_CHANNELS_LAST)
    decoder = host_of(TINY_DECODER, SHORT_TEXT)
    strides = [p.stride() for p in decoder.parameters()]
    assert [p.stride() for p in lay_out(decoder).parameters()] == strides


def test_images_smaller_than_the_pooling_are_refused():
    with pytest.raises(SpecError, match=r"leave nothing of 8x8 images at block 3"):
        host_of(cnn((4, 4, 4, 4), (2,) * 4), DataShape(kind="image", channels=1, resolution=8, num_classes=10))
