"""Fitted Q evaluation: exact expectations, the right sweeps, clustered resamples; random MDPs with known values."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from oracles.tabular import ACTIONS, MASK, S, Table, random_mdp, starts_of_episodes, tree_policy

from esper.leyline.actions import TREE_WIDTH, Op, lever_slice, slot_slice
from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.tree import enumerate_actions, log_prob, log_softmax
from esper.simic.ope.fqe import (
    FqeSpec,
    Starts,
    bellman_targets,
    fit_ensemble,
    fit_values,
    resample_seeds,
    start_estimates,
    starts_of,
    state_values,
)
from esper.simic.ope.targets import PointMass, TreePolicy, Uniform, mixture
from esper.tamiyo import tree_torch
from esper.tamiyo.networks import NetworkSpec

TABLE = FqeSpec(members=8, extra_sweeps=0)


def random_masks(num: int) -> np.ndarray:
    rng = numpy_generator("ope masks")
    mask = rng.random((num, TREE_WIDTH)) < 0.4
    mask[:, Op.WAIT] = True
    for slot, lever in itertools.product(range(6), range(6)):
        mask[:, lever_slice(slot, lever).start] = True
        mask[:, lever_slice(slot, lever).start + 2 : lever_slice(slot, lever).stop] = False
    for op in range(1, 5):
        mask[:, op] &= mask[:, slot_slice(op)].any(axis=1)
        mask[:, slot_slice(op)] &= mask[:, [op]]
    germinates = mask[:, slot_slice(Op.GERMINATE)]
    for slot in range(6):
        block = slice(lever_slice(slot, 0).start, lever_slice(slot, 5).stop)
        mask[:, block] &= germinates[:, [slot]]
    return mask


def test_the_expectation_of_a_mixture_is_the_sum_over_all_valid_actions() -> None:
    mask = random_masks(24)
    rng = numpy_generator("ope values")
    values = rng.normal(size=mask.shape)
    logp = log_softmax(rng.normal(size=mask.shape), mask)
    greedy = tree_torch.argmax(torch.from_numpy(values), torch.from_numpy(mask)).numpy()
    target = mixture([(0.5, TreePolicy(logp)), (0.3, PointMass(greedy)), (0.2, Uniform())])
    states = np.arange(len(mask))
    found = target.expect(torch.from_numpy(values), torch.from_numpy(mask), states).numpy()
    for state in states:
        leaves = enumerate_actions(mask[state])
        at = np.full(len(leaves), state)
        probs = np.exp(target.log_prob(at, leaves, mask[at]))
        value = tree_torch.path_sum(torch.from_numpy(values[at]), torch.from_numpy(leaves)).numpy()
        assert probs.sum() == pytest.approx(1, abs=1e-9)
        assert found[state] == pytest.approx((probs * value).sum(), abs=1e-9)
        own = 0.5 * np.exp(log_prob(logp[at], leaves, mask[at])) + 0.3 * (leaves == greedy[state]).all(axis=1)
        assert (probs >= own - 1e-12).all()


def test_weights_that_do_not_add_up_to_one_are_refused() -> None:
    with pytest.raises(SpecError, match="add up to 1"):
        mixture([(0.5, Uniform()), (0.4, Uniform())])


def test_as_many_sweeps_as_decisions_are_backward_induction_on_the_data() -> None:
    mdp = random_mdp(0)
    data = mdp.episodes(40, "exact")
    policy = tree_policy(mdp.target_SA)
    table = Table()
    rows = np.arange(len(data))
    fit_values(table, data, policy, train=rows, check=rows[:0], spec=TABLE, on_log=lambda _: None)
    leaf = np.array([(data.action_NA == row).all(axis=1) for row in ACTIONS]).argmax(axis=0)
    count, reward, follows = np.zeros((S, 12)), np.zeros((S, 12)), np.zeros((S, 12, S))
    for s, a, r, n in zip(data.state_N, leaf, data.reward_N, data.next_N):
        count[s, a] += 1
        reward[s, a] += r
        follows[s, a, n] += 1
    count = np.maximum(count, 1)
    value = np.zeros(S)
    for _ in range(25):
        value = (mdp.target_SA * (reward / count + (follows / count[:, :, None]) @ value)).sum(axis=1)
    assert state_values(table, data, policy, np.arange(S)) == pytest.approx(value, abs=1e-4)


def test_a_terminal_row_is_worth_its_reward_alone_whatever_the_next_state_holds() -> None:
    mdp = random_mdp(1)
    data = mdp.episodes(3, "terminal")
    data.discount_N[::2] = 0.0
    table = Table()
    table.entries_ST = torch.full((S, TREE_WIDTH), 100.0, dtype=torch.float64)
    policy = tree_policy(mdp.target_SA)
    goal = bellman_targets(table, data, policy, np.arange(len(data))).numpy()
    assert goal[::2] == pytest.approx(data.reward_N[::2], abs=1e-6)
    assert (goal[1::2] > 50).all()


class Falling(Table):
    """Its value falls by one each sweep, so its held-out error is least where the rewards say so."""

    def regress(self, obs_NV: torch.Tensor, action_NA: torch.Tensor, target_N: torch.Tensor) -> None:
        self.entries_ST = self.entries_ST - 1.0


def test_the_best_sweep_after_the_horizon_is_kept_and_patience_ends_the_others() -> None:
    mdp = random_mdp(2)
    data = mdp.episodes(4, "patience")
    data.discount_N[:] = 0.0
    data.reward_N[:] = np.where(data.action_NA[:, 0] == Op.WAIT, -27.0, -54.0)
    values = Falling()
    logs: list[dict[str, float]] = []
    rows = np.arange(len(data))
    spec = FqeSpec(extra_sweeps=20, patience=3)
    policy = tree_policy(mdp.target_SA)
    least = fit_values(values, data, policy, train=rows, check=rows, spec=spec, on_log=logs.append)
    # Entries of -27 add up to -27 for WAIT and to -54 for an op with its slot: sweep 27, two after the horizon of 25.
    assert least == 0.0
    assert float(values.entries_ST[0, 0]) == -27.0
    assert [entry["step"] for entry in logs] == [25, 26, 27, 28, 29, 30]


def test_env_seeds_are_drawn_within_those_that_meet_the_same_environments() -> None:
    seeds = np.array([1, 2, 3, 1, 2, 3, 8, 9])
    environments = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    for member in range(20):
        drawn = resample_seeds(seeds, environments, 0, member)
        assert sum(drawn[seed] for seed in (1, 2, 3)) == 3
        assert sum(drawn[seed] for seed in (8, 9)) == 2
    assert resample_seeds(seeds, environments, 0, 1) == resample_seeds(seeds, environments, 0, 1)


def test_first_states_are_one_per_environment_and_seed_and_weighted_by_how_often_a_seed_was_drawn() -> None:
    starts = starts_of([0, 5, 10, 15, 20], [0, 0, 1, 0, 1], [7, 8, 7, 7, 8])
    assert starts.state_S.tolist() == [0, 5, 10, 20]
    value = np.array([1.0, 2.0, 3.0, 5.0])
    assert starts.means(value).tolist() == [1.5, 4.0, 2.75]
    assert starts.means(value, Counter({7: 2})).tolist() == [1.0, 3.0, 2.0]


def test_an_ensemble_depends_on_its_seed_alone_and_needs_two_env_seeds() -> None:
    mdp = random_mdp(3)
    data = mdp.episodes(20, "seeds")
    starts, policy = starts_of_episodes(data), tree_policy(mdp.target_SA)

    def members(seed: int) -> list[float]:
        ensemble = fit_ensemble(
            data, policy, starts, TABLE, seed=seed, on_log=lambda _: None, make_values=lambda own, sweeps: Table()
        )
        return [float(v) for v in start_estimates(ensemble, data, policy, starts)[1][:, -1]]

    assert members(0) == members(0) != members(1)
    one = Starts(starts.state_S[:1], starts.environment_S[:1], starts.env_seed_S[:1])
    with pytest.raises(SpecError, match="at least two env_seeds"):
        fit_ensemble(data, policy, one, TABLE, seed=0, on_log=lambda _: None)


def test_values_are_fitted_with_additive_networks_alone() -> None:
    with pytest.raises(SpecError, match="head 'logits'"):
        FqeSpec.parse({"network": {"head": "logits"}})


def replicate(number: int, episodes: int) -> tuple[float, bool, float]:
    """Relative error of the estimate, whether its interval covers the true value, and its relative width."""
    mdp = random_mdp(number % 5)
    data = mdp.episodes(episodes, "accept", episodes, number)
    starts, policy = starts_of_episodes(data), tree_policy(mdp.target_SA)
    ensemble = fit_ensemble(
        data, policy, starts, TABLE, seed=number, on_log=lambda _: None, make_values=lambda own, sweeps: Table()
    )
    estimate = start_estimates(ensemble, data, policy, starts)[0][-1]
    true, gap = mdp.value(mdp.target_SA), abs(mdp.value(mdp.target_SA) - mdp.value(mdp.behaviour_SA))
    inside = estimate.low <= true <= estimate.high
    return abs(estimate.mean - true) / gap, inside, (estimate.high - estimate.low) / gap


def test_the_value_of_a_sharper_policy_is_found_within_a_tenth_from_50_episodes_of_random_mdps() -> None:
    assert np.median([replicate(number, 50)[0] for number in range(4)]) <= 0.10


@pytest.mark.slow
def test_random_mdps_error_at_50_and_200_episodes_and_coverage_over_100_replicates() -> None:
    at_50 = np.median([replicate(number, 50)[0] for number in range(40)])
    errors, covered, widths = zip(*(replicate(number, 200) for number in range(100)))
    print(
        f"median relative error {at_50:.3f} at 50 episodes, {np.median(errors):.3f} at 200; "
        f"coverage {np.mean(covered):.2f} over {len(covered)} replicates, median width {np.median(widths):.2f}"
    )
    assert at_50 <= 0.10
    assert np.median(errors) <= 0.03
    assert np.mean(covered) >= 0.75


@pytest.mark.slow
def test_a_network_finds_the_value_of_a_random_mdp_from_200_episodes() -> None:
    errors = []
    spec = FqeSpec(
        network=NetworkSpec(view="v1", head="values", hidden=64, slot_hidden=16, input_noise=0.0),
        members=2,
        extra_sweeps=0,
        steps_per_sweep=100,
        learning_rate=3e-3,
    )
    for number in range(3):
        mdp = random_mdp(number)
        data = mdp.episodes(200, "network", number)
        obs = np.zeros((S, 27), dtype=np.float32)
        obs[:, :S] = np.eye(S)
        data = type(data)(**{name: getattr(data, name) for name in data.__slots__} | {"view": "v1", "obs_MV": obs})
        starts, policy = starts_of_episodes(data), tree_policy(mdp.target_SA)
        ensemble = fit_ensemble(data, policy, starts, spec, seed=number, on_log=lambda _: None)
        estimate = start_estimates(ensemble, data, policy, starts)[0][-1]
        true, gap = mdp.value(mdp.target_SA), abs(mdp.value(mdp.target_SA) - mdp.value(mdp.behaviour_SA))
        errors.append(abs(estimate.mean - true) / gap)
    print(f"relative errors of networks {np.round(errors, 3).tolist()}")
    assert np.median(errors) <= 0.10


def test_the_mask_of_the_twelve_actions_is_exact() -> None:
    assert len(enumerate_actions(MASK)) == 12
