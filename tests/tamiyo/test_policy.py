"""Learned policies: rows stand alone bit for bit, probabilities are exact, checkpoints are sound or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted import episode
from test_tree_torch import random_masks

from esper.leyline import tree
from esper.leyline.actions import is_valid
from esper.leyline.errors import CheckpointError, MaskError, SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.observations import FEATURE_COLUMNS, slot_column
from esper.leyline.protocols import ActInputs
from esper.tamiyo.checkpoints import CARD, WEIGHTS, PolicyCard, load_checkpoint, read_card, save_checkpoint
from esper.tamiyo.loading import load_policy
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded
from esper.tamiyo.policy import LearnedController
from esper.tamiyo.registry import build_controller

BLANK = {"algorithm": "bc", "recipe": {}, "rewards": {}, "training_seed": 0}


def network(**options) -> TreeNet:
    with seeded(0):
        net = TreeNet(NetworkSpec(**options))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return net


def save(folder: Path, net: TreeNet):
    return save_checkpoint(folder, net, PolicyCard(name="p", network=net.spec, **BLANK))


def inputs(num: int, seed: int = 0) -> ActInputs:
    rng = numpy_generator("policy-test", seed)
    columns = {name: rng.random(num).astype(np.float32) for name in FEATURE_COLUMNS}
    for slot in range(6):
        columns[slot_column(slot, "present")] = np.ones(num, np.float32)
        for lever in ("blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr", "stage"):
            columns[slot_column(slot, lever)] = rng.integers(0, 2, num).astype(np.float32)
    return ActInputs(
        columns=columns,
        step_N=rng.integers(0, 20, num),
        mask_NT=random_masks(rng, num),
        uniforms=rng.random((num, 9)),
    )


def take(block: ActInputs, rows) -> ActInputs:
    return ActInputs(
        columns={name: values[rows] for name, values in block.columns.items()},
        step_N=block.step_N[rows],
        mask_NT=block.mask_NT[rows],
        uniforms=block.uniforms[rows],
    )


def start(controller: LearnedController, num: int, **fields):
    return controller.start([episode(**fields)] * num)


@pytest.mark.parametrize("view", ["v1", "v3", "v4"])
def test_a_row_depends_on_itself_alone_bit_for_bit(view: str) -> None:
    controller = LearnedController(network(view=view), name="p", sampled=True)
    block = inputs(150)
    whole = controller.act(block, start(controller, 150))
    order = numpy_generator("order").permutation(150)
    for rows in (np.array([7]), np.array([149, 3, 64]), np.arange(63), order):
        part = controller.act(take(block, rows), start(controller, len(rows)))
        np.testing.assert_array_equal(part.actions_NA, whole.actions_NA[rows])
        np.testing.assert_array_equal(part.logp_N, whole.logp_N[rows])
        np.testing.assert_array_equal(part.op_probs, whole.op_probs[rows])


def test_greedy_actions_are_valid_certain_and_one_hot() -> None:
    controller = LearnedController(network(), name="p", sampled=False)
    block = inputs(40)
    decision = controller.act(block, start(controller, 40))
    assert is_valid(decision.actions_NA, block.mask_NT).all()
    assert (decision.logp_N == 0).all()
    assert (decision.op_probs[np.arange(40), decision.actions_NA[:, 0]] == 1).all()
    assert (decision.op_probs.sum(axis=1) == 1).all()


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_the_mixture_with_u_is_executed_with_its_exact_probability(sampled: bool, epsilon: float) -> None:
    controller = LearnedController(network(), name="p", sampled=sampled)
    one = take(inputs(1), np.zeros(4000, dtype=int))
    draws = numpy_generator("draws", sampled, epsilon).random((4000, 9))
    one = ActInputs(columns=one.columns, step_N=one.step_N, mask_NT=one.mask_NT, uniforms=draws)
    decision = controller.act(one, start(controller, 4000, epsilon=epsilon))
    assert is_valid(decision.actions_NA, one.mask_NT).all()
    actions, index, counts = np.unique(decision.actions_NA, axis=0, return_index=True, return_counts=True)
    probability = np.exp(decision.logp_N[index])
    assert probability.sum() <= 1 + 1e-9
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(counts / 4000 - probability) <= 5 * error + 1e-9).all()
    uniform = tree.log_softmax(tree.uniform_logits(1), one.mask_NT[:1])
    if epsilon == 1.0:
        expected = [tree.log_prob(uniform, action[None], one.mask_NT[:1])[0] for action in actions]
        np.testing.assert_allclose(np.log(probability), expected)


def test_a_row_that_allows_nothing_raises() -> None:
    controller = LearnedController(network(), name="p", sampled=True)
    block = inputs(3)
    block.mask_NT[1] = False
    with pytest.raises(MaskError, match="row 1"):
        controller.act(block, start(controller, 3))
    with pytest.raises(SpecError, match="epsilon"):
        start(controller, 1, epsilon=1.5)


def test_a_checkpoint_comes_back_and_the_registry_builds_it(tmp_path: Path) -> None:
    net = network()
    policy = save(tmp_path / "p", net)
    again, card = load_checkpoint(tmp_path / "p", policy.digest)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert card == read_card(tmp_path / "p")
    assert build_controller(policy).name == "p"
    assert load_policy(tmp_path / "p", sampled=True, name="other").name == "other"
    save(tmp_path / "p", network(view="v1"))
    assert read_card(tmp_path / "p").network.view == "v1"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_missing_damaged_and_mismatched_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_policy(tmp_path / "none", sampled=False)
    policy = save(tmp_path / "p", network())
    with pytest.raises(CheckpointError, match="another policy"):
        load_policy(tmp_path / "p", sampled=False, digest="0" * 64)
    card = json.loads((tmp_path / "p" / CARD).read_text())
    (tmp_path / "p" / CARD).write_text(json.dumps(card | {"network": {"view": "v1"}}))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_policy(tmp_path / "p", sampled=False)
    (tmp_path / "p" / CARD).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_policy(tmp_path / "p", sampled=False)
    save(tmp_path / "p", network())
    weights = bytearray((tmp_path / "p" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "p" / WEIGHTS).write_bytes(bytes(weights))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_policy(tmp_path / "p", sampled=False, digest=policy.digest)
    (tmp_path / "p" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load_policy(tmp_path / "p", sampled=False)
