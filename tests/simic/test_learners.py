"""Losses are the published ones, and a bandit with a known answer is solved (or copied) by each learner."""

import numpy as np
import pytest
import torch
from scipy.stats import expectile
from tree_bandit import BEST, USUAL, bandit_transitions

from esper.leyline import tree
from esper.leyline.actions import Op
from esper.simic.bc import BcRecipe, fit_bc
from esper.simic.cloning import weighted_nll
from esper.simic.cql import CqlRecipe, conservative_gap, cql_losses, fit_cql
from esper.simic.iql import IqlRecipe, advantage_weights, expectile_loss, fit_iql
from esper.simic.learning import Stepper, TrainingError
from esper.simic.replay import Replay
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded, single_thread

SMALL = NetworkSpec(view="v1", hidden=32, slot_hidden=16, input_noise=0.0)
FAST = {"network": SMALL, "batch_size": 128, "learning_rate": 3e-3, "log_every": 100}


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


def quiet(values: dict[str, float]) -> None:
    assert all(np.isfinite(value) for value in values.values())


def split(num: int = 2000):
    data, context = bandit_transitions(num)
    held = data.env_seed_N == 0
    return data.select(~held), data.select(held), data, context


def actions_of(network: TreeNet, data) -> np.ndarray:
    obs, mask = (torch.from_numpy(part[data.state_N]) for part in (data.obs_MV, data.mask_MT))
    with torch.no_grad():
        return tree_torch.greedy(network.logits(obs, mask), mask).numpy()


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7, 0.9])
def test_expectile_regression_converges_to_the_expectile(tau: float) -> None:
    targets = torch.tensor(np.random.default_rng(0).normal(size=500) ** 3)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([value], max_iter=100)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = expectile_loss(targets - value, tau)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert value.item() == pytest.approx(expectile(targets.numpy(), alpha=tau), abs=1e-4)


def test_advantage_weighting_with_beta_zero_is_behaviour_cloning() -> None:
    data, _ = bandit_transitions(200)
    weight = advantage_weights(np.random.default_rng(0).normal(size=200), IqlRecipe(beta=0.0), 1.0)
    with seeded(0):
        policy = TreeNet(SMALL)
    gradients = []
    for replay in (Replay(data, key=(0,), weight_N=weight / weight.mean()), Replay(data, key=(0,))):
        policy.zero_grad()
        weighted_nll(policy, replay.rows()).backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_advantage_weights_are_capped() -> None:
    weight = advantage_weights(np.array([-1.0, 0.0, 50.0]), IqlRecipe(beta=3.0), 1.0)
    np.testing.assert_allclose(weight, [np.exp(-3), 1, 100])


def test_the_conservative_penalty_equals_brute_force_under_both_priors() -> None:
    data, _ = bandit_transitions(8)
    batch = Replay(data, key=(0,)).rows()
    entries = torch.randn(8, 185, generator=torch.Generator().manual_seed(0))
    network = TreeNet(SMALL)
    taken = network.of_action(entries, batch.action)
    gaps = {
        prior: conservative_gap(network, entries, taken, batch, CqlRecipe(prior=prior)).numpy()
        for prior in ("leaves", "hierarchical")
    }
    for row in range(8):
        mask = data.mask_MT[row : row + 1]
        leaves = tree.enumerate_actions(mask[0])
        values = tree_torch.path_sum(entries[row].expand(len(leaves), -1), torch.tensor(leaves)).numpy()
        chosen = values[(leaves == data.action_NA[row]).all(axis=1)].item()
        assert gaps["leaves"][row] == pytest.approx(np.logaddexp.reduce(values) - chosen, abs=1e-5)
        uniform = tree.log_softmax(tree.uniform_logits(1), mask).repeat(len(leaves), axis=0)
        prior = tree.log_prob(uniform, leaves, mask.repeat(len(leaves), axis=0))
        assert gaps["hierarchical"][row] == pytest.approx(np.logaddexp.reduce(values + prior) - chosen, abs=1e-5)


def test_cql_without_penalty_is_double_q_learning() -> None:
    data, _ = bandit_transitions(64)
    data.discount_N[:] = 0.9
    batch = Replay(data, key=(0,)).rows()
    with seeded(1):
        online, slow = TreeNet(SMALL), TreeNet(SMALL)
    td, _ = cql_losses(online, slow, batch, CqlRecipe(network=SMALL, alpha=0.0))
    with torch.no_grad():
        q, q_next, q_slow = (net.double() and net(obs.double()).numpy() for net, obs in (
            (online, batch.obs), (online, batch.next_obs), (slow, batch.next_obs)
        ))  # fmt: skip
    mask = batch.next_mask.numpy()
    best = tree.tree_argmax(q_next, mask)
    target = data.reward_N + 0.9 * tree.log_prob(q_slow, best, mask)
    error = tree.log_prob(q, data.action_NA, batch.mask.numpy()) - target
    assert td.item() == pytest.approx((error**2).mean(), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TrainingError, match="learning rate"):
        Stepper([weight], learning_rate=1e-3, clip=1.0).step((weight * torch.nan).sum(), "x")


def test_bc_copies_the_behaviour() -> None:
    train, held, data, _ = split()
    network = fit_bc(train, held, BcRecipe(**FAST, steps=200), seed=0, on_log=quiet).network
    chosen = actions_of(network, data)
    assert (chosen[:, 0] == Op.GERMINATE).all()
    assert (chosen[:, 2] == USUAL).all()
    with torch.no_grad():
        obs, mask = (torch.from_numpy(part[data.state_N]) for part in (data.obs_MV, data.mask_MT))
        share = network.log_policy(obs, mask)[:, Op.GERMINATE].exp().mean().item()
    assert share == pytest.approx((data.action_NA[:, 0] == Op.GERMINATE).mean(), abs=0.03)


def test_iql_and_cql_find_the_better_action_that_the_behaviour_rarely_takes() -> None:
    train, held, data, context = split()
    iql = IqlRecipe(**FAST, value_steps=300, steps=250, expectile=0.9, beta=2.0, polyak=0.02)
    cql = CqlRecipe(**FAST, steps=300, alpha=0.05, polyak=0.02)
    for fitted in (
        fit_iql(train, held, iql, seed=0, on_log=quiet),
        fit_cql(train, held, cql, seed=0, on_log=quiet),
    ):
        chosen = actions_of(fitted.network, data)
        right = (chosen[:, 0] == Op.GERMINATE) & (chosen[:, 1] == context) & (chosen[:, 2] == BEST)
        assert right.mean() > 0.95


def test_return_weighting_moves_cloning_towards_good_episodes() -> None:
    train, held, data, context = split()
    recipe = BcRecipe(**FAST, steps=200, weighting="return")
    chosen = actions_of(fit_bc(train, held, recipe, seed=0, on_log=quiet).network, data)
    assert ((chosen[:, 1] == context) & (chosen[:, 2] == BEST)).mean() > 0.95
