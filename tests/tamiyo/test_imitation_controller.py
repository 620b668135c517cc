"""The imitation policy acts: four classes become tree actions by rule, masks hold, rows stand alone bit for bit."""

import numpy as np
import pytest
import torch
from scripted import World, environment, episode, observe, run_block, run_one, text_environment
from test_policy import BLANK, inputs, take

from esper.leyline import tree
from esper.leyline.actions import MAX_SLOTS, Op, is_valid, slot_slice
from esper.leyline.controller_specs import HEURISTIC, behaviour
from esper.leyline.errors import MaskError
from esper.leyline.imitation import ActionClass, class_mask, classes_of
from esper.leyline.keys import numpy_generator
from esper.leyline.observations import slot_column
from esper.leyline.protocols import ActInputs
from esper.leyline.stages import Stage
from esper.leyline.views import get_view
from esper.tamiyo.checkpoints import PolicyCard, load_checkpoint, save_checkpoint
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.imitation import ImitationController, ImitationNet, ImitationSpec, choose_classes, class_logits
from esper.tamiyo.networks import seeded
from esper.tamiyo.registry import build_controller

WAIT, GERMINATE, ADVANCE, PRUNE = ActionClass


def network(**options) -> ImitationNet:
    with seeded(0):
        net = ImitationNet(ImitationSpec(**options))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    block = inputs(200)
    net.normaliser.fit(torch.from_numpy(get_view("v1").encode(block.columns, block.step_N)))
    return net


def with_all_ops(num: int) -> ActInputs:
    """Rows of which the first allows every class."""
    blocks = (inputs(num, seed) for seed in range(100))
    whole = ((block, class_mask(block.mask_NT).all(axis=1)) for block in blocks)
    block, rows = next((block, rows) for block, rows in whole if rows.any())
    return take(block, np.argsort(~rows, kind="stable"))


def prefers(*order: ActionClass, **options) -> ImitationController:
    """A policy that wants the classes in this order, whatever it sees."""
    net = ImitationNet(ImitationSpec(**options))
    torch.nn.init.zeros_(net.layers[-1].weight)
    with torch.no_grad():
        for place, code in enumerate(order):
            net.layers[-1].bias[code] = -float(place)
    return ImitationController(net, name="p", sampled=False)


def start(controller: ImitationController, num: int, **fields):
    return controller.start([episode(**fields)] * num)


def test_the_network_is_that_of_the_concept_documents():
    net = ImitationNet(ImitationSpec())
    layers = [layer for layer in net.layers if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(27, 64), (64, 32), (32, 4)]
    assert sum(parameter.numel() for parameter in net.parameters()) == 4004
    assert [type(layer).__name__ for layer in net.layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert get_view("v1").width == 27


def test_one_seeds_life_goes_by_class_and_a_class_without_a_valid_op_is_passed_over():
    env = environment(max_seeds=1)
    events, rows = run_one(prefers(ADVANCE, GERMINATE, WAIT, PRUNE), start=episode(env), horizon=20)
    assert events == [(0, "GERMINATE", 0), (3, "ADVANCE", 0), (8, "FOSSILIZE", 0)]
    assert rows[0].tolist() == [
        Op.GERMINATE,
        0,
        6,
        0,
        1,
        2,
        0,
        1,
    ]  # conv_light, linear, 5 and 3 epochs, isolated, rate 1


def test_prune_takes_the_seed_at_once_and_the_next_germination_goes_to_the_next_slot():
    events, _ = run_one(prefers(PRUNE, GERMINATE, WAIT, ADVANCE), start=episode(environment(num_slots=2)), horizon=5)
    expected = [(0, "GERMINATE", 0), (1, "PRUNE", 0), (2, "GERMINATE", 1), (3, "PRUNE", 1)]
    assert events == expected  # a pruned slot cools down, so the fifth step can only wait


@pytest.mark.parametrize("name", ["baseline", "blueprint-explorer"])
@pytest.mark.parametrize("make", [environment, text_environment])
def test_germinations_are_those_of_the_heuristic_one_after_another(name, make):
    rules = behaviour(name)
    env = make()
    policy = prefers(GERMINATE, ADVANCE, WAIT, PRUNE, rules=rules)
    worlds, starts = [World(env)], [episode(env, replicate=3)]
    reference, carry = HeuristicController(rules), HeuristicController(rules).start(starts)
    own = policy.start(starts)
    seen = 0
    for _ in range(12):
        block = observe(worlds)
        carry = reference.remember(block, carry)
        decision = policy.act(block, own)
        own = decision.carry
        if block.mask_NT[0, Op.GERMINATE]:
            np.testing.assert_array_equal(decision.actions_NA, reference.germination(block, carry))
            seen += 1
        worlds[0].apply(decision.actions_NA[0])
    assert seen == 3


def test_the_slot_is_the_one_furthest_in_life_among_those_where_an_op_of_the_class_is_valid():
    block = inputs(300)
    rng = numpy_generator("lives")
    for slot in range(MAX_SLOTS):
        block.columns[slot_column(slot, "stage")][:] = rng.choice([int(stage) for stage in Stage], 300)
        block.columns[slot_column(slot, "epochs_in_stage")][:] = rng.integers(0, 3, 300)
    for code, ops in ((PRUNE, (Op.PRUNE,)), (ADVANCE, (Op.ADVANCE, Op.FOSSILIZE))):
        policy = prefers(code, WAIT, GERMINATE, *({ADVANCE, PRUNE} - {code}))
        actions = policy.act(block, start(policy, 300)).actions_NA
        for row in range(300):
            able = [s for s in range(MAX_SLOTS) if any(block.mask_NT[row, slot_slice(op)][s] for op in ops)]
            if not able:
                assert actions[row, 0] == Op.WAIT
                continue
            life = {
                slot: (block.columns[f"s{slot}_stage"][row], block.columns[f"s{slot}_epochs_in_stage"][row], -slot)
                for slot in able
            }
            best = max(able, key=life.__getitem__)
            op = next(op for op in reversed(ops) if block.mask_NT[row, slot_slice(op)][best])
            assert actions[row, :2].tolist() == [op, best]


def test_the_controller_takes_the_best_valid_class_of_its_network():
    net = network()
    policy = ImitationController(net, name="p", sampled=False)
    block = with_all_ops(200)
    decision = policy.act(block, start(policy, 200))
    assert is_valid(decision.actions_NA, block.mask_NT).all()
    logits = class_logits(net, get_view("v1").encode(block.columns, block.step_N))
    chosen = choose_classes(logits, block.mask_NT)
    np.testing.assert_array_equal(classes_of(decision.actions_NA), chosen)
    by_hand = [
        max(np.flatnonzero(valid), key=values.__getitem__) for values, valid in zip(logits, class_mask(block.mask_NT))
    ]
    np.testing.assert_array_equal(chosen, by_hand)
    assert len(np.unique(chosen)) == 4
    assert (decision.logp_N == 0).all()


@pytest.mark.parametrize("sampled", [True, False])
def test_a_row_depends_on_itself_alone_bit_for_bit(sampled):
    policy = ImitationController(network(), name="p", sampled=sampled)
    block = inputs(150)
    carry = start(policy, 150, epsilon=0.3)
    whole = policy.act(block, carry)
    order = numpy_generator("order").permutation(150)
    for rows in (np.array([7]), np.array([149, 3, 64]), np.arange(63), order):
        part = policy.act(take(block, rows), start(policy, len(rows), epsilon=0.3))
        np.testing.assert_array_equal(part.actions_NA, whole.actions_NA[rows])
        np.testing.assert_array_equal(part.logp_N, whole.logp_N[rows])
        np.testing.assert_array_equal(part.op_probs, whole.op_probs[rows])
        for key, values in whole.carry.items():
            np.testing.assert_array_equal(part.carry[key], values[rows])


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_draws_and_the_mixture_with_u_have_their_exact_probability(sampled, epsilon):
    net = network()
    policy = ImitationController(net, name="p", sampled=sampled)
    one = take(with_all_ops(20), np.zeros(4000, dtype=int))
    draws = numpy_generator("imitation-draws", sampled, epsilon).random((4000, 9))
    one = ActInputs(columns=one.columns, step_N=one.step_N, mask_NT=one.mask_NT, uniforms=draws)
    decision = policy.act(one, start(policy, 4000, epsilon=epsilon))
    _, index, counts = np.unique(decision.actions_NA, axis=0, return_index=True, return_counts=True)
    probability = np.exp(decision.logp_N[index])
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(counts / 4000 - probability) <= 5 * error + 1e-9).all()
    logits = class_logits(net, get_view("v1").encode(one.columns, one.step_N))[0]
    own = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    own = own if sampled else np.eye(4)[own.argmax()]
    uniform = np.exp(tree.log_softmax(tree.uniform_logits(1), one.mask_NT[:1]))[0, :5]
    by_class = np.eye(4)[[0, 1, 2, 2, 3]].T
    expected = (1 - epsilon) * own + epsilon * by_class @ uniform
    np.testing.assert_allclose(by_class @ decision.op_probs[0], expected)


def test_episodes_in_a_block_do_not_change_one_another():
    policy = ImitationController(network(), name="p", sampled=False)
    envs = [environment(), environment(num_slots=2), environment(max_seeds=1)]
    together, _ = run_block(policy, [World(env) for env in envs], [episode(env) for env in envs])
    for place, env in enumerate(envs):
        alone, _ = run_block(policy, [World(env)], [episode(env)])
        np.testing.assert_array_equal(together[:, place], alone[:, 0])


def test_a_row_that_allows_nothing_raises():
    policy = ImitationController(network(), name="p", sampled=False)
    block = inputs(3)
    block.mask_NT[1] = False
    with pytest.raises(MaskError, match="row 1"):
        policy.act(block, start(policy, 3))


def test_a_checkpoint_comes_back_with_its_rules_and_the_registry_builds_it(tmp_path):
    net = network(rules=behaviour("aggressive"))
    card = PolicyCard(name="p", network=net.spec, **{**BLANK, "algorithm": "imitate"})
    policy = save_checkpoint(tmp_path / "p", net, card)
    again, card = load_checkpoint(tmp_path / "p", policy.digest)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert (card.network.kind, card.network.rules.name) == ("imitation", "aggressive")
    assert card.network.rules != HEURISTIC
    built = build_controller(policy)
    block = inputs(10)
    mine = ImitationController(net, name="p", sampled=False)
    np.testing.assert_array_equal(
        built.act(block, start(built, 10)).actions_NA, mine.act(block, start(mine, 10)).actions_NA
    )
