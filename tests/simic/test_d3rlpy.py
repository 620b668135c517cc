"""d3rlpy as an oracle of the losses and as a backend: what it reads, what it trains, what becomes of its networks."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import synthetic_tables
from oracles.flat_tree import flat_transitions, shapes
from tree_bandit import BEST, USUAL, bandit_transitions

from esper.karn.store import open_store
from esper.leyline.actions import Op, is_valid
from esper.leyline.errors import SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic import iql, learning
from esper.simic.batches import Transitions, from_steps
from esper.simic.cql import CqlRecipe, conservative_gap, cql_losses, double_q_target
from esper.simic.d3rlpy_backend import (
    D3rlpyRecipe,
    build_algorithm,
    copy_network,
    fit_d3rlpy,
    library_randomness,
)
from esper.simic.d3rlpy_export import export_d3rlpy, import_d3rlpy, mdp_dataset
from esper.simic.flat_actions import FlatActions
from esper.simic.iql import IqlRecipe, Values, advantage_weights
from esper.simic.replay import Replay
from esper.simic.returns import n_step
from esper.tamiyo.checkpoints import PolicyCard, save_checkpoint
from esper.tamiyo.flat import FlatController
from esper.tamiyo.loading import load_policy
from esper.tamiyo.networks import seeded, single_thread

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
NUM_INPUTS, NUM_ACTIONS, HIDDEN = 3, 5, (16, 16)
ALGORITHMS = ("bc", "iql", "cql")
TINY = {"view": "v1", "hidden": (32,), "batch_size": 64, "learning_rate": 5e-3, "log_every": 50}


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


def recipe(algorithm: str, **fields) -> D3rlpyRecipe:
    return D3rlpyRecipe(algorithm=algorithm, **TINY | fields)


def stored(num_env_seeds: int = 2) -> Transitions:
    tables = synthetic_tables(num_env_seeds=num_env_seeds, behaviours=("baseline", "random"))
    return from_steps(tables["steps"], "v1", REWARDS)


def flat_problem(num_episodes: int = 12) -> Transitions:
    """Random episodes with NUM_ACTIONS flat actions; every third one is cut off."""
    rng = np.random.default_rng(0)
    episodes = []
    for index in range(num_episodes):
        length = int(rng.integers(2, 9))
        obs, ids = rng.normal(size=(length + 1, NUM_INPUTS)), rng.integers(NUM_ACTIONS, size=length)
        episodes.append((obs, ids, rng.normal(size=length), index % 3 != 0))
    return flat_transitions(episodes, NUM_ACTIONS)


def flat_list() -> FlatActions:
    rows = np.zeros((NUM_ACTIONS, 8), dtype=np.int8)
    rows[:, 0] = np.arange(NUM_ACTIONS)
    return FlatActions(rows)


def cut_off(data: Transitions) -> Transitions:
    """The same transitions, the first episode ended by its time and not by a terminal state."""
    last = int(np.flatnonzero(data.episode_N == data.episode_N[0])[-1])
    discount = data.discount_N.copy()
    discount[last] = 1.0
    return replace(data, discount_N=discount)


def test_the_list_is_wait_every_structural_action_and_the_germinations_of_the_data() -> None:
    data = stored()
    actions = FlatActions.of(data)
    germinations = np.unique(data.action_NA[data.action_NA[:, 0] == Op.GERMINATE], axis=0)
    assert len(actions) == 1 + 3 * 6 + len(germinations)
    assert (actions.actions_LA[0] == 0).all()
    assert (actions.actions_LA[actions.index(data.action_NA)] == data.action_NA).all()
    mask = data.mask_MT[data.state_N]
    valid = actions.valid(mask)
    for action, column in zip(actions.actions_LA, valid.T):
        np.testing.assert_array_equal(column, is_valid(np.tile(action, (len(mask), 1)), mask))
    unseen = np.array([[1, 5, 7, 4, 3, 3, 1, 2]], dtype=np.int8)
    assert actions.index(unseen).tolist() == [-1]
    with pytest.raises(SpecError, match="not among"):
        actions.require(unseen)


@pytest.mark.parametrize(("steps", "gamma"), [(1, 1.0), (3, 0.9)])
def test_d3rlpy_picks_the_transitions_of_our_own_n_step_returns(steps: int, gamma: float) -> None:
    data = cut_off(stored())
    actions = FlatActions.of(data)
    dataset = mdp_dataset(data, actions, n_step=steps, gamma=gamma)
    ours = n_step(data, steps, gamma)
    assert dataset.transition_count == len(ours)
    index = actions.index(ours.action_NA)
    row = 0
    for episode in dataset.episodes:
        for step in range(episode.transition_count):
            theirs = dataset.transition_picker(episode, step)
            np.testing.assert_array_equal(theirs.observation, ours.obs_MV[ours.state_N[row]])
            assert theirs.action.item() == index[row]
            assert theirs.reward.item() == pytest.approx(ours.reward_N[row], abs=1e-6)
            assert gamma**theirs.interval * (1 - theirs.terminal) == pytest.approx(ours.discount_N[row])
            if not theirs.terminal:
                np.testing.assert_array_equal(theirs.next_observation, ours.obs_MV[ours.next_N[row]])
            row += 1


def test_an_export_is_read_back_by_d3rlpy(tmp_path: Path) -> None:
    tables = synthetic_tables(num_env_seeds=2, behaviours=("baseline",))
    dataset = open_store(tmp_path).dataset("small")
    dataset.commit(tables)
    version = dataset.seal(matrix_id="test", provenance={})
    actions = export_d3rlpy(version, tmp_path / "small.h5", view="v1", rewards=REWARDS)
    d3rlpy = import_d3rlpy()
    with (tmp_path / "small.h5").open("rb") as file:
        found = d3rlpy.dataset.ReplayBuffer.load(file, d3rlpy.dataset.InfiniteBuffer())
    data = from_steps(tables["steps"], "v1", REWARDS)
    assert found.transition_count == len(data)
    assert found.dataset_info.observation_signature.shape == [(data.obs_MV.shape[1],)]
    np.testing.assert_array_equal(np.concatenate([e.observations for e in found.episodes]), data.obs_MV[data.state_N])
    ids = np.concatenate([e.actions for e in found.episodes])[:, 0]
    np.testing.assert_array_equal(actions.actions_LA[ids], data.action_NA)
    listing = json.loads((tmp_path / "small.h5.actions.json").read_text())
    np.testing.assert_array_equal(np.array(listing["actions"])[ids], data.action_NA)


def test_rows_missing_in_the_middle_of_an_episode_are_refused() -> None:
    data = stored()
    keep = np.ones(len(data), dtype=bool)
    keep[1] = False
    with pytest.raises(SpecError, match="rows missing"):
        mdp_dataset(data.select(keep), FlatActions.of(data))


def networks(monkeypatch: pytest.MonkeyPatch):
    nets = shapes(NUM_INPUTS, NUM_ACTIONS, HIDDEN)
    monkeypatch.setattr(learning, "TreeNet", nets.tree)
    monkeypatch.setattr(iql, "ValueNet", nets.value)
    return nets


def torch_batch(data: Transitions):
    """Every transition as d3rlpy's batch, in the order of the rows."""
    d3rlpy = import_d3rlpy()
    dataset = mdp_dataset(data, flat_list())
    rows = [dataset.transition_picker(e, step) for e in dataset.episodes for step in range(e.transition_count)]
    batch = d3rlpy.dataset.TransitionMiniBatch.from_transitions(rows)
    return d3rlpy.torch_utility.TorchMiniBatch.from_batch(batch, gamma=1.0, compute_returns_to_go=False, device="cpu:0")


def give(layers: torch.nn.Module, source: torch.nn.Module) -> None:
    """Copy d3rlpy's linear layers into one of the oracle's perceptrons."""
    theirs = [part for part in source.modules() if isinstance(part, torch.nn.Linear)]
    ours = [part for part in layers if isinstance(part, torch.nn.Linear)]
    for mine, yours in zip(ours, theirs, strict=True):
        mine.load_state_dict(yours.state_dict())


def built(settings: D3rlpyRecipe):
    with library_randomness(1):
        algorithm, _ = build_algorithm(settings)
        algorithm.create_impl((NUM_INPUTS,), NUM_ACTIONS)
    return algorithm.impl


@pytest.mark.parametrize("reward_scale", [0.1, 3.0])
def test_cql_losses_equal_those_of_d3rlpy_on_a_flat_problem(
    monkeypatch: pytest.MonkeyPatch, reward_scale: float
) -> None:
    """d3rlpy's temporal difference is a Huber loss, which is half the square up to 1 and linear beyond."""
    nets = networks(monkeypatch)
    data = flat_problem()
    data = replace(data, reward_N=data.reward_N * reward_scale)
    impl = built(D3rlpyRecipe(algorithm="cql", hidden=HIDDEN, gamma=0.9, alpha=0.7))
    with seeded(0):
        online, slow = nets.tree(None), nets.tree(None)
        torch.nn.init.normal_(impl.modules.targ_q_funcs[0]._fc.bias, std=0.1)
    give(online.layers, impl.modules.q_funcs[0])
    give(slow.layers, impl.modules.targ_q_funcs[0])
    theirs_batch = torch_batch(data)
    theirs = impl.compute_loss(theirs_batch, impl.compute_target(theirs_batch))
    batch = Replay(n_step(data, 1, 0.9), key=(0,)).rows()
    ours = CqlRecipe(prior="leaves", alpha=0.7)
    td, penalty = cql_losses(online, slow, batch, ours)
    assert penalty.item() == pytest.approx(theirs.conservative_loss.item(), rel=1e-5)
    values = online.of_action(online(batch.obs), batch.action)
    target = double_q_target(online, slow, batch)
    huber = torch.nn.functional.huber_loss(values, target)
    assert huber.item() == pytest.approx(theirs.td_loss.item(), rel=1e-5)
    assert (huber + 0.7 * penalty).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    largest = (values - target).abs().max()
    assert td.item() == pytest.approx((values - target).square().mean().item(), rel=1e-6)
    if largest < 1:
        assert (td / 2 + 0.7 * penalty).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert bool(largest < 1) is (reward_scale < 1)


def test_cql_gradients_equal_those_of_d3rlpy_where_errors_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = networks(monkeypatch)
    data = flat_problem()
    data = replace(data, reward_N=data.reward_N * 0.1)
    impl = built(D3rlpyRecipe(algorithm="cql", hidden=HIDDEN, gamma=0.9, alpha=0.7))
    online = nets.tree(None)
    give(online.layers, impl.modules.q_funcs[0])
    impl.compute_grad(torch_batch(data))
    td, penalty = cql_losses(online, online, Replay(n_step(data, 1, 0.9), key=(0,)).rows(), CqlRecipe(prior="leaves"))
    (td / 2 + 0.7 * penalty).backward()
    theirs = [part for part in impl.modules.q_funcs[0].modules() if isinstance(part, torch.nn.Linear)]
    ours = [part for part in online.layers if isinstance(part, torch.nn.Linear)]
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.weight.grad, yours.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_hierarchical_prior_of_a_flat_problem_changes_the_penalty_by_a_constant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nets = networks(monkeypatch)
    batch = Replay(flat_problem(), key=(0,)).rows()
    with seeded(0):
        net = nets.tree(None)
    entries = net(batch.obs)
    taken = net.of_action(entries, batch.action)
    gaps = [
        conservative_gap(net, entries, taken, batch, CqlRecipe(prior=prior)) for prior in ("leaves", "hierarchical")
    ]
    torch.testing.assert_close(gaps[0] - gaps[1], torch.full_like(gaps[0], np.log(NUM_ACTIONS)))


def test_the_losses_of_the_iql_plug_in_equal_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    networks(monkeypatch)
    data = flat_problem()
    impl = built(D3rlpyRecipe(algorithm="iql", hidden=HIDDEN, gamma=0.9, expectile=0.8, beta=2.0))
    ours = IqlRecipe(expectile=0.8, beta=2.0)
    with seeded(3):
        for critic in impl.modules.targ_q_funcs:
            torch.nn.init.normal_(critic._fc.bias)
        values = Values(ours, data)
        policy = learning.TreeNet(ours.network)
    for net in (values.q1, values.q2, values.v, values.slow1, values.slow2):
        net.encoder.normaliser.mean.zero_()
        net.encoder.normaliser.sd.fill_(1.0)
    for net, critic in zip((values.q1, values.q2), impl.modules.q_funcs):
        give(net.layers, critic)
    for net, critic in zip((values.slow1, values.slow2), impl.modules.targ_q_funcs):
        give(net.layers, critic)
    give(values.v.layers, impl.modules.value_func)
    give(policy.layers, impl.modules.policy)
    batch = Replay(n_step(data, 1, 0.9), key=(0,)).rows()
    theirs = torch_batch(data)
    for mine, yours in zip(values.losses(batch, 0.8), impl.value_losses(theirs)):
        assert mine.item() == pytest.approx(yours.item(), rel=1e-5)
    advantage = values.advantages(data)
    np.testing.assert_allclose(impl.advantage(theirs).detach().numpy(), advantage, rtol=1e-4, atol=1e-6)
    weight = advantage_weights(advantage, ours, float(advantage.std()))
    logp = policy.log_prob(batch.obs, batch.mask, batch.action).detach().numpy()
    assert impl.policy_loss(theirs).item() == pytest.approx(-(weight / weight.mean() * logp).mean(), rel=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_copied_network_gives_what_d3rlpy_gives(algorithm: str) -> None:
    data = stored()
    settings = recipe(algorithm, steps=20, log_every=20)
    with library_randomness(0):
        fitted = fit_d3rlpy(data, data.select(np.zeros(len(data), bool)), settings, seed=0, on_log=lambda _: None)
    network = fitted.network
    inputs = network.inputs(torch.from_numpy(data.obs_MV)).numpy()
    with library_randomness(7):
        library, module_of = build_algorithm(settings)
        library.create_impl((inputs.shape[1],), network.spec.num_actions)
    copy_network(module_of(), network)
    with torch.no_grad():
        ours = network(torch.from_numpy(data.obs_MV)).numpy()
    if algorithm == "cql":
        columns = [library.predict_value(inputs, np.full(len(inputs), a)) for a in range(network.spec.num_actions)]
        np.testing.assert_allclose(ours, np.stack(columns, axis=1), atol=1e-5)
    else:
        with torch.no_grad():
            theirs = module_of()(torch.from_numpy(inputs)).logits.numpy()
        np.testing.assert_allclose(ours - np.logaddexp.reduce(ours, axis=1, keepdims=True), theirs, atol=1e-5)
    np.testing.assert_array_equal(ours.argmax(axis=1), library.predict(inputs))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bandit_is_copied_or_solved(algorithm: str) -> None:
    data, context = bandit_transitions(600)
    held = data.env_seed_N == 0
    extra = {} if algorithm == "bc" else {"n_step": 1}
    extra |= {"alpha": 0.05, "target_steps": 50} if algorithm == "cql" else {}
    extra |= {"expectile": 0.9} if algorithm == "iql" else {}
    logs: list[dict[str, float]] = []
    fitted = fit_d3rlpy(
        data.select(~held), data.select(held), recipe(algorithm, steps=250, **extra), seed=0, on_log=logs.append
    )
    assert [log["step"] for log in logs] == [50.0 * k for k in range(1, 6)]
    assert all(np.isfinite(value) for log in logs for value in log.values())
    assert fitted.metrics["held_out_policy_loss"] <= logs[0]["held_out_policy_loss"] or algorithm != "bc"
    actions = FlatActions.of(data)
    obs = torch.from_numpy(data.obs_MV[data.state_N])
    with torch.no_grad():
        scores = fitted.network(obs).numpy()
    chosen = fitted.network.actions.numpy()[
        np.where(actions.valid(data.mask_MT[data.state_N]), scores, -np.inf).argmax(1)
    ]
    wanted = (USUAL, np.zeros_like(context)) if algorithm == "bc" else (BEST, context)
    right = (chosen[:, 0] == Op.GERMINATE) & (chosen[:, 2] == wanted[0]) & (chosen[:, 1] == wanted[1])
    assert right.mean() > 0.9


def test_the_same_seed_gives_the_same_checkpoint_and_no_global_generator_moves(tmp_path: Path) -> None:
    data, _ = bandit_transitions(300)
    none = data.select(np.zeros(len(data), bool))

    def train(seed: int, folder: str) -> str:
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        fitted = fit_d3rlpy(data, none, recipe("iql", steps=10, log_every=5), seed=seed, on_log=lambda _: None)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        card = PolicyCard(
            name="flat", algorithm="iql", network=fitted.network.spec, recipe={}, rewards={}, training_seed=seed
        )
        return save_checkpoint(tmp_path / folder, fitted.network, card).digest

    first = train(0, "a")
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert train(0, "b") == first
    assert train(1, "c") != first
    controller = load_policy(tmp_path / "a", sampled=False)
    assert isinstance(controller, FlatController)
    np.testing.assert_array_equal(controller.actions_LA, FlatActions.of(data).actions_LA)


def test_fields_that_an_algorithm_does_not_read_are_refused() -> None:
    with pytest.raises(SpecError, match="alpha is not read by iql"):
        D3rlpyRecipe.parse({"algorithm": "iql", "alpha": 2.0})
    with pytest.raises(SpecError, match="multiple of log_every"):
        D3rlpyRecipe.parse({"algorithm": "bc", "steps": 150})
    for name in ALGORITHMS:
        assert load("recipes", f"d3rlpy-{name}", D3rlpyRecipe).algorithm == name
