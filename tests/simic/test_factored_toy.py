"""Known answers on the factored toy: its anchors, return-weighted cloning, and tree against atomic values.

The budget is that of the published figures: 2,500 updates of 256 rows, width 128, no discount, tau .8, beta 5; the
other fields are the recipes' own. Every seed trains on the same episodes; none is held out.
"""

import numpy as np
import pytest
import torch
from oracles import factored_toy as toy

from esper.leyline.actions import Actions, Bools
from esper.simic.batches import Transitions
from esper.simic.bc import RwbcRecipe, fit_bc
from esper.simic.iql import IqlRecipe, fit_iql
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import NetworkSpec, TreeNet, single_thread

NUM_SEEDS, UPDATES = 5, 2500
TEST_SEEDS = range(400)
TREE = NetworkSpec(view="v1", hidden=128)
ATOMIC = NetworkSpec(view="v1", hidden=128, form="atomic")
BUDGET = {"steps": UPDATES, "batch_size": 256, "log_every": UPDATES}
LEARNERS = {
    "rwbc": (fit_bc, RwbcRecipe(network=TREE, **BUDGET)),
    "iql tree": (fit_iql, IqlRecipe(network=TREE, **BUDGET, value_steps=UPDATES, expectile=0.8, beta=5.0)),
    "iql atomic": (fit_iql, IqlRecipe(network=ATOMIC, **BUDGET, value_steps=UPDATES, expectile=0.8, beta=5.0)),
}


def acting(network: TreeNet) -> toy.Policy:
    """A network's greedy policy, which sees the observation alone; `play` refuses an action that is not valid."""

    def act(world: toy.World, mask: Bools) -> Actions:
        with torch.no_grad():
            valid = torch.from_numpy(mask)
            return tree_torch.greedy(network.logits(torch.from_numpy(world.observe()), valid), valid).numpy()

    return act


def returns(name: str, data: Transitions) -> list[float]:
    """The mean return of a learner's policies, one per seed."""
    fit, recipe = LEARNERS[name]
    none = data.select(np.zeros(len(data), dtype=bool))
    found = []
    with single_thread():
        for seed in range(NUM_SEEDS):
            network = fit(data, none, recipe, seed=seed, on_log=lambda _: None).network
            found.append(toy.mean_return(toy.play(acting(network), TEST_SEEDS)))
            print(name, len(np.unique(data.episode_N)), "episodes, seed", seed, round(found[-1], 3), flush=True)
    return found


def test_the_toy_has_a_wide_gap_between_its_oracle_and_chance() -> None:
    assert 1.8 < toy.mean_return(toy.play(toy.hand_oracle, range(100))) < 2.2
    assert -0.65 < toy.mean_return(toy.play(toy.uniform, range(100))) < -0.35


def test_episodes_are_the_same_for_the_same_seeds_and_know_nothing_of_their_company() -> None:
    both = toy.play(toy.HEURISTICS["hasty"], [3, 4])
    alone = toy.play(toy.HEURISTICS["hasty"], [4])
    np.testing.assert_array_equal(both.obs_MV[toy.HORIZON + 1 :], alone.obs_MV)
    np.testing.assert_array_equal(both.reward_N[toy.HORIZON :], alone.reward_N)
    joined = toy.join([both, alone])
    np.testing.assert_array_equal(joined.obs_MV[joined.state_N[2 * toy.HORIZON :]], alone.obs_MV[alone.state_N])
    assert joined.episode_M[joined.state_N].tolist() == joined.episode_N.tolist()


@pytest.mark.slow
def test_from_198_episodes_return_weighted_cloning_is_good_and_the_tree_no_worse_than_atomic_values() -> None:
    data, behaviours = toy.behaviour_data(6)
    print("behaviours: mean", round(np.mean(list(behaviours.values())), 3), "best", round(max(behaviours.values()), 3))
    found = {name: returns(name, data) for name in LEARNERS}
    assert np.mean(found["rwbc"]) >= 0.65
    assert np.mean(found["iql tree"]) >= np.mean(found["iql atomic"])


@pytest.mark.slow
def test_from_990_episodes_values_on_the_tree_are_above_the_best_behaviour() -> None:
    data, behaviours = toy.behaviour_data(30)
    best = max(behaviours, key=behaviours.__getitem__)
    name, epsilon = best.rsplit(" ", 1)
    live = toy.mean_return(toy.play(toy.mixed(toy.HEURISTICS[name], float(epsilon), "live"), TEST_SEEDS))
    print("best behaviour", best, "in the data", round(behaviours[best], 3), "live", round(live, 3))
    assert np.mean(returns("iql tree", data)) > max(behaviours[best], live)
