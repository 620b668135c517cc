"""Known answers: offline CartPole from mixed, mostly bad episodes, beside d3rlpy's own learner in the same run."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import cartpole
from oracles.flat_tree import flat_mask, shapes, tree_actions

from esper.simic import iql, learning
from esper.simic.batches import Transitions
from esper.simic.bc import BcRecipe, fit_bc
from esper.simic.cql import CqlRecipe, fit_cql
from esper.simic.d3rlpy_backend import D3rlpyRecipe, build_algorithm
from esper.simic.d3rlpy_export import import_d3rlpy, library_randomness, mdp_dataset
from esper.simic.flat_actions import FlatActions
from esper.simic.iql import IqlRecipe, fit_iql
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import TreeNet, single_thread

NUM_SEEDS, STEPS, BATCH, RATE, GAMMA, HIDDEN = 5, 4000, 128, 3e-4, 0.99, (256, 256)
COMMON = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "log_every": 1000}
OURS = {
    "bc": (fit_bc, BcRecipe(**COMMON)),
    "cql": (fit_cql, CqlRecipe(**COMMON, alpha=1.0, gamma=GAMMA, n_step=1, prior="leaves")),
    "iql": (fit_iql, IqlRecipe(**COMMON, value_steps=STEPS, gamma=GAMMA, n_step=1, expectile=0.7, beta=3.0)),
}

Act = Callable[[np.ndarray], np.ndarray]


def ours(name: str, data: Transitions, seed: int) -> Act:
    """The best action of a network that a shipped learner trained (the tree's networks replaced by perceptrons)."""
    fit, recipe = OURS[name]
    none = data.select(np.zeros(len(data), dtype=bool))
    network: TreeNet = fit(data, none, recipe, seed=seed, on_log=lambda _: None).network

    def act(obs: np.ndarray) -> np.ndarray:
        mask = torch.from_numpy(flat_mask(len(obs), 2))
        with torch.no_grad():
            return tree_torch.greedy(network.logits(torch.from_numpy(obs), mask), mask)[:, 0].numpy()

    return act


def theirs(data: Transitions, seed: int) -> Act:
    """d3rlpy's DiscreteCQL on the same rows, standardised in the same way."""
    seen = data.obs_MV[data.state_N].astype(np.float64)
    mean, sd = seen.mean(axis=0), seen.std(axis=0)

    def standard(obs: np.ndarray) -> np.ndarray:
        return ((obs - mean) / sd).astype(np.float32)

    dataset = mdp_dataset(data, FlatActions(tree_actions(np.arange(2))), obs_MV=standard(data.obs_MV))
    recipe = D3rlpyRecipe(
        algorithm="cql", hidden=HIDDEN, steps=STEPS, batch_size=BATCH, learning_rate=RATE, log_every=1000, gamma=GAMMA,
        alpha=1.0, n_step=1, target_steps=200,
    )  # fmt: skip
    with library_randomness(seed):
        algorithm, _ = build_algorithm(recipe)
        quiet = import_d3rlpy().logging.NoopAdapterFactory()
        algorithm.fit(dataset, n_steps=STEPS, n_steps_per_epoch=STEPS, logger_adapter=quiet, show_progress=False)
    return lambda obs: algorithm.predict(standard(obs))


def test_the_data_are_mostly_bad() -> None:
    data = cartpole.mixed_episodes()
    total = data.return_N[np.unique(data.episode_N, return_index=True)[1]]
    assert len(total) == 200
    assert 80 < total.mean() < 95
    assert (total < 100).mean() > 0.8


@pytest.mark.slow
def test_cql_and_iql_balance_where_the_data_mostly_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = shapes(4, 2, HIDDEN)
    monkeypatch.setattr(learning, "TreeNet", nets.tree)
    monkeypatch.setattr(iql, "ValueNet", nets.value)
    data = cartpole.mixed_episodes()
    returns: dict[str, list[float]] = {name: [] for name in (*OURS, "d3rlpy cql")}
    with single_thread():
        for seed in range(NUM_SEEDS):
            for name in OURS:
                returns[name].append(cartpole.evaluate(ours(name, data, seed)))
            returns["d3rlpy cql"].append(cartpole.evaluate(theirs(data, seed)))
            print({name: values[-1] for name, values in returns.items()}, flush=True)
    mean = {name: float(np.mean(values)) for name, values in returns.items()}
    print({name: round(value, 1) for name, value in mean.items()})
    assert mean["cql"] >= 450
    assert mean["iql"] >= 420
    assert mean["bc"] < min(mean["cql"], mean["iql"])
    assert mean["cql"] >= mean["d3rlpy cql"] - 40
