"""The network: shapes for every view, weights shared over slots, finite on any input, seeded."""

import pytest
import torch

from esper.leyline.actions import LEVER_START, NUM_LEVER_CHOICES, TREE_WIDTH, slot_slice
from esper.leyline.views import NUM_GLOBAL_V4, NUM_SLOT_V4, VIEWS
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import NetworkSpec, TreeNet, ValueNet, seeded
from esper.tamiyo.normaliser import LAYOUTS


def observations(view: str, num: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(num, VIEWS[view].width, generator=generator)
    layout = LAYOUTS[view]
    if layout.num_indices:
        obs[:, layout.num_numbers :] = torch.randint(-1, 8, (num, layout.num_indices), generator=generator)
    if layout.has_presence:
        obs[:, layout.num_global :: layout.slot_width] = 1.0
    return obs


@pytest.mark.parametrize("view", ["v1", "v3", "v4", "v4-hidden"])
def test_entries_and_values_have_their_shapes_and_every_parameter_a_gradient(view: str) -> None:
    spec = NetworkSpec(view=view, hidden=16, slot_hidden=8)
    obs = observations(view)
    with seeded(0):
        policy, value = TreeNet(spec), ValueNet(spec)
    policy.encoder.normaliser.fit(obs)
    entries = policy(obs)
    assert entries.shape == (5, TREE_WIDTH)
    assert value(obs).shape == (5,)
    (entries.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_layouts_are_those_of_the_views() -> None:
    for name, view in VIEWS.items():
        layout = LAYOUTS[name]
        assert layout.num_numbers + layout.num_indices == view.width
        assert layout.num_indices == view.num_blueprint_indices
    names = VIEWS["v4"].names
    assert all(names[NUM_GLOBAL_V4 + slot * NUM_SLOT_V4] == f"s{slot}_present" for slot in range(6))
    assert VIEWS["v3"].names[LAYOUTS["v3"].num_global].startswith("s0_")


def test_swapping_two_slots_swaps_their_entries_once_their_embeddings_are_equal() -> None:
    with seeded(0):
        net = TreeNet(NetworkSpec()).eval()
    with torch.no_grad():
        net.encoder.slot_embedding.zero_()
    obs = observations("v4")
    swapped = obs.clone()
    first, second = (slice(NUM_GLOBAL_V4 + s * NUM_SLOT_V4, NUM_GLOBAL_V4 + (s + 1) * NUM_SLOT_V4) for s in (0, 1))
    swapped[:, first], swapped[:, second] = obs[:, second], obs[:, first]
    with torch.no_grad():
        a, b = net(obs), net(swapped)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6)
    for op in range(1, 5):
        part = slot_slice(op).start
        assert torch.allclose(a[:, part], b[:, part + 1], atol=1e-6)
    middle = LEVER_START + NUM_LEVER_CHOICES
    assert torch.allclose(a[:, LEVER_START:middle], b[:, middle : middle + NUM_LEVER_CHOICES], atol=1e-6)


def test_the_normaliser_standardises_slots_together_ignores_absent_ones_and_clips() -> None:
    obs = observations("v4", 400)
    obs[:, NUM_GLOBAL_V4 + 3 * NUM_SLOT_V4 :] = 0.0
    obs[:, 0] = 7.0
    normaliser = TreeNet(NetworkSpec()).encoder.normaliser.eval()
    normaliser.fit(obs)
    shared, blocks = normaliser(obs)
    assert (shared[:, 0] == 0).all()
    assert (blocks[:, 3:] == 0).all()
    present = blocks[:, :3, 1:].reshape(-1, NUM_SLOT_V4 - 1)
    assert torch.allclose(present.mean(0), torch.zeros(NUM_SLOT_V4 - 1), atol=1e-4)
    assert torch.allclose(present.std(0, correction=0), torch.ones(NUM_SLOT_V4 - 1), atol=1e-3)
    far, _ = normaliser(obs + 1e6)
    assert far.abs().max() <= 10


def test_a_value_network_acts_step_by_step_as_its_best_leaf() -> None:
    with seeded(0):
        net = TreeNet(NetworkSpec(head="values", temperature=0.1)).eval()
    obs, mask = observations("v4"), torch.ones(5, TREE_WIDTH, dtype=torch.bool)
    with torch.no_grad():
        best = tree_torch.argmax(net(obs), mask)
        assert torch.equal(tree_torch.greedy(net.logits(obs, mask), mask), best)


def test_initial_weights_depend_on_the_seed_alone_and_leave_torch_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    nets = []
    for _ in range(2):
        with seeded(3):
            nets.append(TreeNet(NetworkSpec()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_inputs_are_noisy_in_training_mode_alone() -> None:
    with seeded(0):
        net = TreeNet(NetworkSpec(input_noise=0.5))
        obs = observations("v4")
        assert not torch.equal(net(obs), net(obs))
    assert torch.equal(net.eval()(obs), net(obs))
