from __future__ import annotations

import time

import pytest
import torch
from engine_specs import tiny_environment

from esper.kasmina.gating import gate_params
from esper.kasmina.hosts import DataShape
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import BLENDS, Blend
from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.host_specs import BLUEPRINTS, CnnHost, ResNetHost, TransformerHost
from esper.leyline.library import load
from esper.leyline.specs import EnvironmentSpec, TinyStoriesTask
from esper.leyline.stages import Stage
from esper.tolaria.cost import blueprint_costs, environment_costs, host_costs, lineage_epoch_flops, wider_factor
from esper.tolaria.lineage import EpochMetrics, Lineage, new_network
from esper.tolaria.roots import open_root, root_environment
from esper.tolaria.runtime import single_thread
from esper.tolaria.tasks import load_task

GAP = load("environments", "digits-gap", EnvironmentSpec)
CIFAR = DataShape(kind="image", channels=3, resolution=32, num_classes=10)
STORIES = DataShape(kind="text", channels=1, resolution=256, num_classes=50_257)


def resnet_environment(**changes):
    return tiny_environment(host={"kind": "resnet", "layers": 18, "width_factor": 0.0625}, **changes)


def text_environment(**changes):
    task = TinyStoriesTask(context=16, vocabulary=64, rows=(32, 16, 16)).model_dump()
    host = {"kind": "transformer", "layers": 3, "heads": 2, "embed": 8, "slots": 3}
    return tiny_environment(task=task, host=host, **changes)


@pytest.mark.parametrize(
    ("resolution", "changes"),
    [
        (12, {}),
        (12, {"pools": (2, 1, 1), "narrowed": (0, 1, 0)}),
        (9, {"kernels": (3, 3, 3), "frozen": (True, False, False)}),
        (12, {"kernels": (3, 5, 3), "frozen": (False, True, False)}),
        (32, {"kernels": (3, 3, 3), "frozen": (True, True, True), "width_factor": 1.5}),
    ],
)
def test_a_training_pass_adds_weight_gradients_but_of_frozen_layers_and_input_gradients_but_of_the_first(
    resolution, changes
):
    spec = CnnHost(**({"channels": (4, 8, 16), "kernels": (3, 1, 1), "pools": (2, 2, 2)} | changes))
    shape = DataShape(kind="image", channels=1, resolution=resolution, num_classes=10)
    forwards, channels, training = [], 1, 0
    for index, outputs in enumerate(spec.block_channels):
        forwards.append(2 * spec.kernels[index] ** 2 * channels * outputs * resolution**2)
        trained = not (spec.frozen and spec.frozen[index])
        training += forwards[-1] * (1 + trained + (index > 0))
        channels, resolution = outputs, resolution // spec.pools[index]
    costs = host_costs(spec, shape)
    assert list(costs.forward_by_segment) == forwards
    assert costs.head_forward == 2 * channels * 10
    assert costs.train_per_sample == training + 3 * costs.head_forward


def test_the_costs_that_stored_rows_of_digits_gap_carry():
    costs = environment_costs(GAP)
    assert (costs.num_params, list(costs.forward_by_segment), costs.head_forward) == (422, [10368, 2304, 2304], 320)
    assert costs.train_per_sample == 35_520


def test_a_resnet_costs_what_its_published_operations_say_and_is_counted_once():
    small = host_costs(ResNetHost(layers=18), CIFAR)
    assert sum(small.forward_by_segment) + small.head_forward == 1_110_845_440
    stem = 2 * 27 * 64 * 32**2
    assert small.train_per_sample == 3 * 1_110_845_440 - stem
    begin = time.process_time()
    large = host_costs(ResNetHost(layers=34), CIFAR)
    assert time.process_time() - begin < 3
    assert sum(large.forward_by_segment) + large.head_forward == 2_318_804_992
    assert host_costs(ResNetHost(layers=34), CIFAR) is large


def test_a_decoder_costs_its_matrix_products_with_attention_and_embeddings_are_free():
    costs = host_costs(TransformerHost(), STORIES)
    width, tokens = 384, 256
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    assert list(costs.forward_by_segment) == [2 * block] * 3
    assert costs.head_forward == 2 * tokens * width * 50_257
    assert costs.train_per_sample == 3 * (6 * block + costs.head_forward)


def test_counting_draws_nothing_from_the_random_state_of_the_process():
    state = torch.get_rng_state()
    for spec, shape in (
        (CnnHost(channels=(3,), kernels=(1,), pools=(2,)), CIFAR),
        (TransformerHost(layers=3), STORIES),
    ):
        host_costs.__wrapped__(spec, shape)
    blueprint_costs.__wrapped__("cnn", 7, 8, 4)
    assert torch.equal(state, torch.get_rng_state())


def test_blueprints_are_counted_in_the_shape_of_their_topology():
    cnn, text = (BLUEPRINTS[topology].index for topology in ("cnn", "transformer"))
    assert blueprint_costs("cnn", cnn("conv_light"), 8, 6).forward == 2 * 9 * 8 * 8 * 36
    assert blueprint_costs("transformer", text("mlp"), 8, 6).forward == 2 * (8 * 32 + 32 * 8) * 6
    attention = blueprint_costs("transformer", text("attention"), 8, 6)
    assert attention.forward == 2 * 6 * (8 * 24 + 8 * 8) + 2 * 2 * 6 * 6 * 8
    for topology in BLUEPRINTS:
        assert all(blueprint_costs(topology, blueprint, 16, 6).keeps_shape for blueprint in range(8))


def grown_lineage(spec, blend):
    """Conv_light blended into slot 0, conv_light incubating in slot 1, two epochs run."""
    lineage = Lineage("key", spec, new_network(spec, 5, load_task(spec.task)))
    blended = SeedKey(0, 6, 1, 0, "own_pass", 0)
    lineage.incubate(blended, 5, lineage.network.host.places[0].channels)
    lineage.blend_in(SlotState(Stage.TRAINING, 1, blended, BLENDS.index(blend), 0, 0, 0), 5)
    lineage.history = [EpochMetrics()] * 3
    return lineage


def test_an_epoch_costs_host_and_blended_seeds_three_times_and_an_incubation_its_suffix_twice():
    lineage = grown_lineage(GAP, Blend.LINEAR)
    own, linear, spent, waiting = (
        SeedKey(1, 6, 1, 1, incubation, start)
        for incubation, start in (("own_pass", 1), ("linearised", 1), ("linearised", -2), ("own_pass", -1))
    )
    for key in (own, linear, spent, waiting):
        lineage.incubate(key, 5, 8)
    costs = environment_costs(GAP)
    samples = GAP.batch_size * GAP.batches_per_epoch
    first, second = 2 * 9 * 4 * 4 * 36, 2 * 9 * 8 * 8 * 9
    host, by_seed = lineage_epoch_flops(lineage, costs)
    assert host == samples * (costs.train_per_sample + 3 * first)
    suffix = costs.forward_by_segment[2] + costs.head_forward
    assert by_seed == {
        own: samples * (3 * second + 2 * suffix),
        linear: samples * 3 * second,
        spent: samples * second,
        waiting: 0,
    }


def test_a_gated_blend_costs_its_gate_too():
    plain, _ = lineage_epoch_flops(grown_lineage(GAP, Blend.LINEAR), environment_costs(GAP))
    gated, _ = lineage_epoch_flops(grown_lineage(GAP, Blend.GATED), environment_costs(GAP))
    hidden = 8
    assert gate_params(4) == 5 * hidden + hidden + 1
    assert gated - plain == 3 * GAP.batch_size * GAP.batches_per_epoch * 2 * (4 * hidden + hidden)


@pytest.mark.parametrize(
    ("environment", "times"),
    [
        (lambda: GAP, 1.7),
        (lambda: GAP, 9.0),
        (resnet_environment, 2.0),
        (text_environment, 1.7),
        (text_environment, 4.0),
    ],
)
def test_the_wider_factor_is_the_smallest_that_reaches_the_operations(environment, times):
    spec = environment()
    samples = spec.batch_size * spec.batches_per_epoch

    def flops(factor):
        return environment_costs(root_environment(spec, f"wider:{factor!r}")).train_per_sample * samples

    factor = wider_factor(spec, times * flops(1.0))
    assert flops(factor) >= times * flops(1.0)
    step = spec.host.heads / spec.host.embed if spec.host.kind == "transformer" else 1 / 32
    assert flops(factor - step) < times * flops(1.0)
    assert wider_factor(spec, 1.0) == 1.0
    assert wider_factor(spec, flops(1.0)) == 1.0


def test_no_host_is_wide_enough_for_everything():
    with pytest.raises(SpecError, match="no width factor up to 64"):
        wider_factor(GAP, 1e30)


def test_a_narrower_decoder_widens_in_steps_of_its_heads():
    half = text_environment().model_copy(
        update={"host": TransformerHost(layers=3, heads=2, embed=8, width_factor=0.75)}
    )
    samples = half.batch_size * half.batches_per_epoch
    widths = {}
    for width in (6, 8, 10):
        host = TransformerHost(layers=3, heads=2, embed=width)
        widths[width] = host_costs(host, load_task(half.task).shape).train_per_sample * samples
    for width, flops in widths.items():
        wider = root_environment(half, f"wider:{wider_factor(half, flops)!r}")
        assert wider.host.embed_width == width


@pytest.mark.parametrize("environment", [tiny_environment, resnet_environment, text_environment])
def test_every_kind_of_host_opens_every_kind_of_root(environment):
    single_thread()
    spec = environment(slots=("early", "late"), warm_start_epochs=1)
    data = load_task(spec.task)
    last = spec.host.num_slots - 1
    blueprint = spec.blueprints[0]
    bare, slots = open_root(spec, 5, "host", data)
    assert bare.network.grafts == {}
    assert set(slots) == {SlotState()}
    bigger, slots = open_root(spec, 5, f"bigger:{blueprint}", data)
    assert set(bigger.network.grafts) == {0, last}
    assert [slot.stage is Stage.FOSSILIZED for slot in slots] == [index in (0, last) for index in range(last + 1)]
    wider, _ = open_root(spec, 5, "wider:2", data)
    assert [p.channels for p in wider.network.host.places] == [2 * p.channels for p in bare.network.host.places]
    for lineage in (bare, bigger, wider):
        assert len(lineage.history) == 1
        assert lineage.history[0].val_loss > 0


@pytest.mark.parametrize(
    ("root", "error", "says"),
    [
        ("bigger:conv_hevy", UnknownNameError, "conv_heavy"),
        ("bigger:lora", UnknownNameError, "unknown blueprint"),
        ("wider:wide", SpecError, "wider:1.5"),
        ("wider:-1", SpecError, "positive"),
        ("wider:nan", SpecError, "positive"),
        ("taller:2", SpecError, "unknown root"),
        ("host:2", SpecError, "unknown root"),
    ],
)
def test_a_wrong_root_is_refused(root, error, says):
    with pytest.raises(error, match=says):
        root_environment(GAP, root)


def test_a_decoder_takes_the_blueprints_of_its_own_topology():
    assert root_environment(text_environment(), "bigger:lora").host.kind == "transformer"
    with pytest.raises(UnknownNameError, match="unknown blueprint 'conv_heavy'"):
        root_environment(text_environment(), "bigger:conv_heavy")
