"""Flat policies: rows stand alone bit for bit, only valid listed actions, exact probabilities; cards of every kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import BLANK, inputs, start, take

from esper.leyline import tree
from esper.leyline.actions import MAX_SLOTS, Op, is_valid
from esper.leyline.errors import CheckpointError
from esper.leyline.keys import numpy_generator
from esper.leyline.protocols import ActInputs
from esper.tamiyo.checkpoints import CARD, PolicyCard, load_checkpoint, read_card, save_checkpoint
from esper.tamiyo.flat import FlatController, FlatNet, FlatSpec, valid_actions
from esper.tamiyo.imitation import ImitationController, ImitationSpec
from esper.tamiyo.kinds import build_network
from esper.tamiyo.loading import load_policy
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded
from esper.tamiyo.policy import LearnedController


def listed() -> np.ndarray:
    """WAIT, every ADVANCE, FOSSILIZE and PRUNE, and two blueprints in every slot."""
    rows = [[0] * 8]
    rows += [[op, slot, *[0] * 6] for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE) for slot in range(MAX_SLOTS)]
    rows += [[Op.GERMINATE, slot, blueprint, *[0] * 5] for slot in range(MAX_SLOTS) for blueprint in (0, 1)]
    return np.array(rows, dtype=np.int8)


def network(view: str = "v1", head: str = "logits") -> FlatNet:
    actions = listed()
    with seeded(0):
        net = FlatNet(FlatSpec(view=view, hidden=(16, 8), num_actions=len(actions), head=head, temperature=0.5))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    net.actions.copy_(torch.from_numpy(actions))
    return net


@pytest.mark.parametrize("view", ["v1", "v3", "v4", "v4-hidden"])
def test_a_row_depends_on_itself_alone_bit_for_bit(view: str) -> None:
    controller = FlatController(network(view), name="p", sampled=True)
    block = inputs(150)
    whole = controller.act(block, start(controller, 150))
    order = numpy_generator("order").permutation(150)
    for rows in (np.array([], dtype=int), np.array([7]), np.array([149, 3, 64]), np.arange(63), order):
        part = controller.act(take(block, rows), start(controller, len(rows)))
        np.testing.assert_array_equal(part.actions_NA, whole.actions_NA[rows])
        np.testing.assert_array_equal(part.logp_N, whole.logp_N[rows])
        np.testing.assert_array_equal(part.op_probs, whole.op_probs[rows])


def test_greedy_takes_the_best_listed_action_that_the_mask_allows() -> None:
    controller = FlatController(network(head="values"), name="p", sampled=False)
    block = inputs(80)
    decision = controller.act(block, start(controller, 80))
    assert is_valid(decision.actions_NA, block.mask_NT).all()
    assert (decision.logp_N == 0).all()
    assert (decision.op_probs[np.arange(80), decision.actions_NA[:, 0]] == 1).all()
    obs = torch.from_numpy(controller._view.encode(block.columns, block.step_N))
    with torch.no_grad():
        scores = controller.network(obs).numpy()
    for row, mask in enumerate(block.mask_NT):
        allowed = [i for i, action in enumerate(listed()) if is_valid(action[None], mask[None])[0]]
        best = allowed[int(np.argmax(scores[row, allowed]))]
        np.testing.assert_array_equal(decision.actions_NA[row], listed()[best])
    assert len(np.unique(decision.actions_NA, axis=0)) > 3


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_the_mixture_with_u_is_executed_with_its_exact_probability(sampled: bool, epsilon: float) -> None:
    controller = FlatController(network(), name="p", sampled=sampled)
    one = take(inputs(1, seed=3), np.zeros(4000, dtype=int))
    draws = numpy_generator("draws", sampled, epsilon).random((4000, 9))
    one = ActInputs(columns=one.columns, step_N=one.step_N, mask_NT=one.mask_NT, uniforms=draws)
    decision = controller.act(one, start(controller, 4000, epsilon=epsilon))
    assert is_valid(decision.actions_NA, one.mask_NT).all()
    actions, index, counts = np.unique(decision.actions_NA, axis=0, return_index=True, return_counts=True)
    probability = np.exp(decision.logp_N[index])
    assert probability.sum() <= 1 + 1e-9
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(counts / 4000 - probability) <= 5 * error + 1e-9).all()
    if epsilon == 0.0:
        assert probability.sum() == pytest.approx(1.0, abs=0.01)
    if epsilon == 1.0:
        uniform = tree.log_softmax(tree.uniform_logits(1), one.mask_NT[:1])
        expected = [tree.log_prob(uniform, action[None], one.mask_NT[:1])[0] for action in actions]
        np.testing.assert_allclose(decision.logp_N[index], expected)
    np.testing.assert_allclose(decision.op_probs.sum(axis=1), 1.0)


def test_a_temperature_flattens_a_sampled_policy() -> None:
    controller = FlatController(network(), name="p", sampled=True)
    block = inputs(200)
    own, flat = (controller.act(block, start(controller, 200, temperature=t)) for t in (None, 1e6))
    num = valid_actions(listed(), block.mask_NT).sum(axis=1)
    np.testing.assert_allclose(flat.logp_N, -np.log(num), atol=1e-4)
    assert not np.allclose(own.logp_N, flat.logp_N, atol=0.1)


def test_values_over_their_temperature_are_logits() -> None:
    obs = torch.rand(5, 27)
    with torch.no_grad():
        torch.testing.assert_close(network(head="values").logits(obs) * 0.5, network(head="logits").logits(obs))


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (NetworkSpec(view="v1", hidden=8, slot_hidden=4), LearnedController),
        (FlatSpec(view="v3", hidden=(8,), num_actions=3), FlatController),
        (ImitationSpec(), ImitationController),
    ],
)
def test_every_kind_of_network_comes_back_from_its_checkpoint_as_its_controller(
    tmp_path: Path, spec: NetworkSpec | FlatSpec | ImitationSpec, kind: type
) -> None:
    with seeded(1):
        net = build_network(spec)
    saved = save_checkpoint(tmp_path / "p", net, PolicyCard(name="p", network=spec, **BLANK))
    again, card = load_checkpoint(tmp_path / "p", saved.digest)
    assert type(again) is type(net)
    assert card.network == spec
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    controller = load_policy(tmp_path / "p", sampled=False, name="other")
    assert type(controller) is kind
    assert controller.name == "other"


def test_a_card_without_a_kind_is_a_tree_and_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    net = TreeNet(NetworkSpec(view="v1"))
    save_checkpoint(tmp_path / "p", net, PolicyCard(name="p", network=net.spec, **BLANK))
    data = json.loads((tmp_path / "p" / CARD).read_text())
    assert data["network"].pop("kind") == "tree"
    (tmp_path / "p" / CARD).write_text(json.dumps(data))
    assert read_card(tmp_path / "p").network == net.spec
    assert isinstance(load_checkpoint(tmp_path / "p")[0], TreeNet)
    data["network"]["kind"] = "forest"
    (tmp_path / "p" / CARD).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="forest"):
        read_card(tmp_path / "p")
