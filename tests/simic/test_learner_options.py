"""What every learner can do besides: remember, stop early, go on after a kill, weigh trajectories, share nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_task import STEPS, memory_transitions
from tree_bandit import BEST, bandit_transitions

from esper.leyline import tree
from esper.leyline.actions import lever_slice
from esper.leyline.errors import SpecError
from esper.simic.batches import Transitions
from esper.simic.bc import BcRecipe, RwbcRecipe, fit_bc
from esper.simic.cql import CqlRecipe, conservative_gap, fit_cql
from esper.simic.iql import IqlRecipe, fit_iql
from esper.simic.replay import Replay, trajectory_probabilities
from esper.simic.resume import Progress
from esper.simic.returns import n_step, returns_to_go
from esper.tamiyo import tree_torch
from esper.tamiyo.checkpoints import PolicyCard, load_checkpoint, save_checkpoint
from esper.tamiyo.networks import History, NetworkSpec, TreeNet, seeded, single_thread

SMALL = NetworkSpec(view="v1", hidden=24, slot_hidden=12, input_noise=0.1)
GRU = SMALL.model_copy(update={"trunk": "gru"})
ATOMIC = SMALL.model_copy(update={"form": "atomic"})
LISTED = SMALL.model_copy(update={"form": "listed"})


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


def quiet(values: dict[str, float]) -> None:
    assert all(np.isfinite(value) for value in values.values())


def fit(recipe, train: Transitions, held: Transitions, **options):
    function = fit_iql if isinstance(recipe, IqlRecipe) else fit_cql if isinstance(recipe, CqlRecipe) else fit_bc
    return function(train, held, recipe, **{"seed": 0, "on_log": quiet, **options})


def halves(data: Transitions) -> tuple[Transitions, Transitions]:
    held = data.env_seed_N == 0
    return data.select(~held), data.select(held)


def recipe_of(algorithm: str, network: NetworkSpec, steps: int, **options):
    shared = {"network": network, "batch_size": 64, "learning_rate": 3e-3, "log_every": 10, **options}
    if algorithm == "iql":
        return IqlRecipe(**shared, steps=steps, value_steps=2 * steps, n_step=STEPS, polyak=0.05)
    if algorithm == "cql":
        return CqlRecipe(**shared, steps=steps, n_step=STEPS, polyak=0.05, alpha=0.05)
    return {"bc": BcRecipe, "rwbc": RwbcRecipe}[algorithm](**shared, steps=steps)


def right_slot(network: TreeNet, data: Transitions, cue: np.ndarray) -> float:
    """Share of last decisions, which `data` holds alone, in the slot that the cue named."""
    rows = data.select(~data.forced_N)
    (batch,) = list(Replay(rows, key=(0,), whole_episodes=network.spec.trunk == "gru").chunks())[:1]
    with torch.no_grad():
        chosen = tree_torch.greedy(network.logits(batch.obs, batch.mask), batch.mask).numpy()
    return float((chosen[:, 1] == cue[: len(chosen)]).mean())


@pytest.mark.parametrize("algorithm", ["rwbc", "iql", "cql"])
def test_a_recurrent_learner_solves_what_only_memory_can(algorithm: str) -> None:
    data, cue = memory_transitions()
    train, held = halves(data)
    found = fit(recipe_of(algorithm, GRU, 150), train, held).network
    assert right_slot(found, data, cue) > 0.95


def test_without_memory_the_same_task_is_chance() -> None:
    data, cue = memory_transitions()
    found = fit(recipe_of("rwbc", SMALL, 150), *halves(data)).network
    assert 0.3 < right_slot(found, data, cue) < 0.7


def test_whole_episodes_show_each_row_its_own_past_and_future() -> None:
    data, _ = memory_transitions(20)
    data = n_step(data, 3, 1.0)
    rows = data.select(np.arange(len(data)) % 3 > 0)
    for batch in Replay(rows, key=(0,), whole_episodes=True).chunks():
        for side, plain in ((batch.obs, rows.state_N), (batch.next_obs, rows.next_N)):
            assert isinstance(side, History)
            seen = side.obs_ETV.flatten(0, 1)[side.at_N]
            np.testing.assert_array_equal(seen.numpy(), data.obs_MV[plain])
    drawn = Replay(rows, key=(0,), whole_episodes=True, weighting="return").sample(8)
    assert drawn.obs.obs_ETV.shape[1] == STEPS + 1
    assert len(drawn.action) == len(drawn.obs.at_N) < 20
    with pytest.raises(SpecError, match="episode_M"):
        Replay(replace(rows, episode_M=None), key=(0,), whole_episodes=True)


def test_whole_episodes_are_drawn_as_often_as_their_rows_would_be() -> None:
    data, _ = memory_transitions(12, right_share=0.5)
    replay = Replay(data, key=(0,), weighting="return", temperature=1.0, whole_episodes=True)
    expected = trajectory_probabilities(data, 1.0).reshape(12, STEPS).sum(axis=1)
    counts = np.zeros(12)
    for _ in range(600):
        first = replay.sample(STEPS * 10).obs.obs_ETV[:, 0].numpy()
        counts += (first[:, None] == data.obs_MV[:: STEPS + 1]).all(axis=2).sum(axis=0)
    share = counts / counts.sum()
    error = np.sqrt(expected * (1 - expected) / counts.sum())
    assert (np.abs(share - expected) < 5 * error).all()


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("algorithm", "network"),
    [(name, network) for name in ("rwbc", "iql", "cql") for network in (SMALL, GRU, ATOMIC)] + [("cql", LISTED)],
    ids=lambda part: part if isinstance(part, str) else f"{part.trunk}-{part.form}",
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, algorithm: str, network: NetworkSpec) -> None:
    train, held = halves(memory_transitions(60)[0])
    recipe = recipe_of(algorithm, network, 20, log_every=4, patience=3)
    whole = fit(recipe, train, held)
    for killed_at in (2, 6):
        logs = []

        def on_log(values: dict[str, float], logs=logs, killed_at=killed_at) -> None:
            logs.append(values)
            if len(logs) == killed_at:
                raise Killed

        folder = tmp_path / str(killed_at)
        try:
            fit(recipe, train, held, on_log=on_log, progress=Progress(folder, every_steps=3))
        except Killed:
            assert len(logs) == killed_at
        resumed = fit(recipe, train, held, progress=Progress(folder, every_steps=3))
        assert resumed.metrics == whole.metrics
        for name, value in whole.network.state_dict().items():
            assert torch.equal(value, resumed.network.state_dict()[name])
        assert Progress(folder, every_steps=3).finished("policy")


@pytest.mark.parametrize("algorithm", ["bc", "iql", "cql"])
def test_patience_ends_a_loop_that_only_learns_by_heart_and_returns_its_best(algorithm: str) -> None:
    data, _ = bandit_transitions(120)
    rng = np.random.default_rng(0)
    data = replace(data, reward_N=rng.normal(size=120), return_N=rng.normal(size=120))
    data.obs_MV[:] = rng.normal(size=data.obs_MV.shape)
    train, held = data.select(data.env_seed_N < 5), data.select(data.env_seed_N >= 5)
    found = {}
    for patience in (None, 3):
        logs: list[dict[str, float]] = []
        recipe = recipe_of(algorithm, SMALL, 100, patience=patience, learning_rate=1e-2)
        found[patience] = fit(recipe, train, held, on_log=logs.append).metrics, logs
    metrics, logs = found[3]
    last = max(log.get("step", 0.0) for log in logs)
    assert last < 100
    assert metrics["chosen_step"] == last - 30
    name = {"bc": "held_out_policy_loss", "iql": "held_out_policy_loss", "cql": "held_out_td_loss"}[algorithm]
    measured = [log[name] for log in logs if log.get("step") == metrics["chosen_step"]]
    assert [metrics[name]] == measured
    assert max(log.get("step", 0.0) for log in found[None][1]) == 100
    assert ("chosen_step" in found[None][0]) == (algorithm != "cql")


def test_an_atomic_learner_finds_the_best_action_and_keeps_its_list(tmp_path: Path) -> None:
    data, context = bandit_transitions(1500)
    train, held = halves(data)
    for algorithm in ("iql", "cql"):
        recipe = recipe_of(algorithm, ATOMIC, 250, batch_size=128)
        if algorithm == "iql":
            recipe = recipe.model_copy(update={"expectile": 0.9, "n_step": 1, "polyak": 0.02, "beta": 2.0})
        network = fit(recipe, train, held).network
        assert network.spec.num_leaves == 1 + 2 * 4
        obs, mask = (torch.from_numpy(part[data.state_N]) for part in (data.obs_MV, data.mask_MT))
        with torch.no_grad():
            chosen = tree_torch.greedy(network.logits(obs, mask), mask).numpy()
        assert ((chosen[:, 1] == context) & (chosen[:, 2] == BEST)).mean() > 0.9
        again = TreeNet(network.spec)
        again.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(again.eval()(obs), network(obs))


def levers_apart() -> tuple[Transitions, list[list[int]]]:
    """Blueprint 2 is worth 1 and so is tempo 1, each beside the other's first value; nobody tried them together."""
    tried = [[1, 0, 2, 0, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    data, _ = bandit_transitions(400)
    which = np.arange(400) % 4
    actions = np.zeros_like(data.action_NA)
    actions[:, :5] = np.array(tried)[which]
    mask = data.mask_MT.copy()
    mask[:, lever_slice(0, 2).start + 1] = True
    data = replace(data, action_NA=actions, mask_MT=mask, reward_N=np.array([1.0, 1.0, 0.0, 0.5])[which])
    return data, tried


def test_a_sum_of_levers_that_were_never_tried_together_is_not_chosen_from_a_list(tmp_path: Path) -> None:
    data, tried = levers_apart()
    obs, mask = (torch.from_numpy(part[data.state_N]) for part in (data.obs_MV, data.mask_MT))
    chosen = {}
    for form, network in (("additive", SMALL), ("listed", LISTED)):
        recipe = recipe_of("cql", network, 300, batch_size=128).model_copy(update={"n_step": 1, "alpha": 0.01})
        fitted = fit(recipe, data, data.select(np.zeros(len(data), dtype=bool))).network
        with torch.no_grad():
            found = tree_torch.greedy(fitted.logits(obs, mask), mask)
        chosen[form] = {tuple(row[:5]) for row in found.tolist()}
    assert chosen["additive"] == {(1, 0, 2, 0, 1)}
    assert chosen["listed"] <= {tuple(action) for action in tried[:2]}
    card = PolicyCard(name="q", algorithm="cql", network=fitted.spec, recipe={}, rewards={}, training_seed=0)
    save_checkpoint(tmp_path / "q", fitted, card)
    again, _ = load_checkpoint(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(again.logits(obs, mask), fitted.logits(obs, mask))


def test_a_listed_network_values_what_is_held_out_though_it_is_not_in_its_list() -> None:
    data, _ = levers_apart()
    other = data.action_NA.copy()
    other[0] = [1, 0, 3, 0, 0, 0, 0, 0]
    recipe = recipe_of("cql", LISTED, 20)
    metrics = fit(recipe, data, replace(data, action_NA=other)).metrics
    assert np.isfinite(metrics["held_out_td_loss"])


def test_only_learners_that_choose_by_value_take_a_list() -> None:
    listed = LISTED.model_dump()
    for recipe in (BcRecipe, RwbcRecipe, IqlRecipe):
        with pytest.raises(SpecError, match="choose by value"):
            recipe.parse({"network": listed})
    with pytest.raises(SpecError, match="form"):
        TreeNet(NetworkSpec(form="listed", num_leaves=3))


def test_returns_to_go_are_sums_of_what_followed() -> None:
    data, _ = memory_transitions(5)
    data.reward_N[:] = np.arange(len(data))
    for gamma in (1.0, 0.9):
        by_hand = [
            sum(gamma**k * data.reward_N[row + k] for k in range(STEPS - row % STEPS)) for row in range(len(data))
        ]
        np.testing.assert_allclose(returns_to_go(data, gamma), by_hand)


@pytest.mark.parametrize("prior", ["leaves", "hierarchical"])
def test_the_monte_carlo_bound_is_within_log_2_of_the_bound_of_every_action(prior: str) -> None:
    data, _ = bandit_transitions(16)
    data.forced_N[3] = True
    to_go = np.linspace(-3, 6, 16)
    batch = Replay(data, key=(0,), to_go_N=to_go).rows()
    entries = torch.randn(16, 185, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        network = TreeNet(SMALL)
    recipe = CqlRecipe(network=SMALL, prior=prior, monte_carlo_bound=True)
    taken = network.of_action(entries, batch.action)
    gaps = conservative_gap(network, entries, taken, batch, recipe).numpy()
    for row in range(16):
        mask = data.mask_MT[row : row + 1]
        leaves = tree.enumerate_actions(mask[0])
        values = tree_torch.path_sum(entries[row].expand(len(leaves), -1), torch.tensor(leaves)).numpy()
        chosen = values[(leaves == data.action_NA[row]).all(axis=1)].item()
        log_rho = np.zeros(len(leaves))
        if prior == "hierarchical":
            uniform = tree.log_softmax(tree.uniform_logits(1), mask).repeat(len(leaves), axis=0)
            log_rho = tree.log_prob(uniform, leaves, mask.repeat(len(leaves), axis=0))
        soft, bound = np.logaddexp.reduce(values + log_rho), np.logaddexp.reduce(to_go[row] + log_rho)
        expected = soft if data.forced_N[row] else max(soft, bound)
        assert gaps[row] == pytest.approx(expected - chosen, abs=1e-5)
        by_action = np.logaddexp.reduce(np.maximum(values, to_go[row]) + log_rho)
        assert data.forced_N[row] or expected - 1e-5 <= by_action <= expected + np.log(2) + 1e-5


def test_the_monte_carlo_bound_keeps_values_at_the_scale_of_returns() -> None:
    data, _ = bandit_transitions(400)
    train, held = halves(replace(data, reward_N=data.reward_N + 5, return_N=data.return_N + 5))
    mean_value = {}
    for bound in (False, True):
        recipe = CqlRecipe(
            network=SMALL, batch_size=64, learning_rate=3e-3, steps=150, alpha=5.0, monte_carlo_bound=bound
        )
        network = fit_cql(train, held, recipe, seed=0, on_log=quiet).network
        obs, mask = (torch.from_numpy(part[data.state_N]) for part in (data.obs_MV, data.mask_MT))
        with torch.no_grad():
            uniform = tree_torch.log_softmax(torch.zeros(len(obs), 185), mask)
            mean_value[bound] = tree_torch.expectation(uniform, network(obs), mask).mean().item()
    actual = float((data.reward_N + 5).mean())
    assert mean_value[False] < mean_value[True] - 0.5
    assert abs(mean_value[True] - actual) < abs(mean_value[False] - actual)
