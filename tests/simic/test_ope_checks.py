"""What speaks for and against an estimate: doubly robust, effective sample sizes, calibration, branches, ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import synthetic_tables
from scipy import stats

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.library import load
from esper.leyline.ope import ALL
from esper.leyline.rewards import RewardSpec
from esper.simic.ope.branch_oracle import (
    MeasuredBranch,
    Tried,
    correlate,
    measured_branches,
    plan_branches,
    stored_branches,
)
from esper.simic.ope.calibration import behaviours_of, measured_returns, spread_out
from esper.simic.ope.doubly_robust import WeightedEpisodes, wdr_estimate, weighted_doubly_robust
from esper.simic.ope.effective_samples import effective_episodes, usable_decisions
from esper.simic.ope.estimate import first_states, value_behaviour, value_policy
from esper.simic.ope.fqe import FqeSpec
from esper.simic.ope.logged import Logged, load_logged, replay_actions
from esper.simic.ope.ranking import ranking_quality, regret_at, sharpe_at
from esper.simic.ope.targets import policy_target
from esper.tamiyo.checkpoints import PolicyCard, save_checkpoint
from esper.tamiyo.networks import NetworkSpec, TreeNet, seeded
from esper.tamiyo.registry import build_controller

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
SMALL = NetworkSpec(hidden=16, slot_hidden=8, head="values")
TINY = FqeSpec(network=SMALL, members=2, extra_sweeps=2, steps_per_sweep=2, batch_size=16)
BEHAVIOURS = ("baseline", "aggressive", "random", "schedule-sampler")


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=4, behaviours=BEHAVIOURS, horizon=8))
    return dataset.seal(matrix_id="test", provenance={})


@pytest.fixture(scope="module")
def logged(version: Version) -> Logged:
    return load_logged(version, "v4", REWARDS)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LearnedPolicy:
    with seeded(3):
        network = TreeNet(NetworkSpec(hidden=16, slot_hidden=8))
    card = PolicyCard(name="p", algorithm="bc", network=network.spec, recipe={}, rewards={}, training_seed=0)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "p", network, card)


# Importance weights


def test_effective_sample_sizes_by_hand() -> None:
    ratio = np.log(np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 0.5, 0.0001]]))
    ratio[2, 2] = -np.inf
    # Weights 1, 1, 2 | 2, 1, 1 | 2, 1, 0.
    assert effective_episodes(ratio) == pytest.approx([16 / 6, 16 / 6, 9 / 5])
    assert usable_decisions(effective_episodes(ratio), least=2) == 2
    assert usable_decisions(effective_episodes(ratio), least=1) == 3
    assert effective_episodes(np.full((4, 2), -np.inf)).tolist() == [0.0, 0.0]
    assert effective_episodes(np.zeros((7, 2))).tolist() == [7.0, 7.0]


def slow_wdr(rho: np.ndarray, reward: np.ndarray, q: np.ndarray, v: np.ndarray) -> float:
    total = 0.0
    num, horizon = rho.shape
    before = [1.0 / num] * num
    product = [1.0] * num
    for t in range(horizon):
        product = [product[i] * rho[i, t] for i in range(num)]
        whole = sum(product)
        now = [p / whole if whole > 0 else 0.0 for p in product]
        for i in range(num):
            total += now[i] * reward[i, t] - (now[i] * q[i, t] - before[i] * v[i, t])
        before = now
    return total


def test_weighted_doubly_robust_is_the_textbook_loop_also_after_the_last_weight_is_gone() -> None:
    rng = numpy_generator("wdr test")
    rho, reward, q, v = (rng.random((6, 5)) * 3 for _ in range(4))
    rho[:3, 2] = 0.0
    for gone in (False, True):
        if gone:
            rho[:, 3] = 0.0
        with np.errstate(divide="ignore"):
            episodes = WeightedEpisodes(
                log_ratio_EH=np.log(rho), reward_EH=reward, q_EH=q, v_EH=v, env_seed_E=np.arange(6)
            )
        assert weighted_doubly_robust(episodes) == pytest.approx(slow_wdr(rho, reward, q, v), abs=1e-12)


def test_doubly_robust_needs_no_values_on_policy_and_no_weights_with_exact_values() -> None:
    rng = numpy_generator("wdr limits")
    reward = rng.normal(size=(40, 3))
    seeds = np.repeat(np.arange(8), 5)
    zero = np.zeros((40, 3))
    on_policy = WeightedEpisodes(log_ratio_EH=zero, reward_EH=reward, q_EH=zero, v_EH=zero, env_seed_E=seeds)
    assert weighted_doubly_robust(on_policy) == pytest.approx(reward.sum(axis=1).mean())
    found = wdr_estimate([on_policy], key=("test",))
    by_seed = reward.sum(axis=1).reshape(8, 5).mean(axis=1)
    expected = stats.norm.interval(0.95, by_seed.mean(), by_seed.std() / np.sqrt(8))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.15)
    togo = np.tile([3.0, 2.0, 1.0], (40, 1))
    exact = WeightedEpisodes(
        log_ratio_EH=rng.normal(size=(40, 3)), reward_EH=zero + 1, q_EH=togo, v_EH=togo, env_seed_E=seeds
    )
    found = wdr_estimate([exact], key=("test",))
    assert (found.low, found.mean, found.high) == pytest.approx((3.0, 3.0, 3.0))


# Logged episodes and targets


def test_behaviours_with_known_propensities_are_found_and_the_others_counted(logged: Logged) -> None:
    behaviours, left_out = behaviours_of(logged)
    assert [b.name for b in behaviours] == ["aggressive", "aggressive ε 0.2", "baseline", "baseline ε 0.2", "random"]
    assert [len(b.episodes_E) for b in behaviours] == [4] * 5
    assert left_out == 1  # the schedule-sampler


def test_episodes_without_propensities_are_left_out_of_weights_and_counted(
    version: Version, logged: Logged, policy: LearnedPolicy
) -> None:
    estimates = value_policy(policy, logged, TINY, seed=0, on_log=lambda _: None).estimates
    assert [item.environment for item in estimates] == ["digits-gap", ALL]
    first = estimates[0]
    assert (first.num_env_seeds, first.num_episodes, first.num_without_propensity) == (4, 20, 8)
    assert len(first.effective_episodes) == 8
    assert first.fqe.low <= first.fqe.mean <= first.fqe.high
    assert len(first.members) == 2
    again = value_policy(policy, load_logged(version, "v4", REWARDS), TINY, seed=0, on_log=lambda _: None).estimates
    assert again == estimates
    other = value_policy(policy, logged, TINY, seed=1, on_log=lambda _: None).estimates
    assert other[0].fqe != first.fqe


def test_a_sampled_policy_is_valued_by_its_distribution(logged: Logged, policy: LearnedPolicy) -> None:
    data = logged.transitions
    states = np.arange(len(data.mask_MT))
    greedy = policy_target(policy, logged)
    actions = replay_actions(build_controller(policy), logged)
    assert (greedy.log_prob(states, actions, data.mask_MT) == 0).all()
    sampled = policy_target(policy.model_copy(update={"sampled": True}), logged)
    assert (sampled.log_prob(states, actions, data.mask_MT)[~logged_forced(logged)] < -1e-6).all()


def logged_forced(logged: Logged) -> np.ndarray:
    from esper.leyline.actions import is_forced

    return is_forced(logged.transitions.mask_MT)


def test_measured_returns_average_within_an_env_seed_first(logged: Logged) -> None:
    behaviour = behaviours_of(logged)[0][0]
    returns = logged.returns[behaviour.episodes_E]
    seeds = np.array([logged.episodes[e]["env_seed"] for e in behaviour.episodes_E])
    expected = np.mean([returns[seeds == seed].mean() for seed in np.unique(seeds)])
    means, counts = measured_returns(behaviour, logged, first_states(logged))
    assert means == pytest.approx([expected, expected])
    assert counts.tolist() == [4, 4]


def test_a_behaviour_is_covered_where_its_measured_return_lies_in_the_interval(logged: Logged) -> None:
    behaviour = behaviours_of(logged)[0][-1]
    for check in value_behaviour(behaviour, logged, TINY, seed=0, on_log=lambda _: None):
        assert check.covered == (check.fqe.low <= check.measured_return <= check.fqe.high)


# The branch oracle


def tried(values: list[float], groups: list[int]) -> Tried:
    num = len(values)
    return Tried(
        then="complete",
        state_B=np.arange(num),
        action_BA=np.zeros((num, 8), dtype=np.int8),
        measured_B=np.array(values),
        group_B=np.array(groups),
        env_seed_B=np.array(groups),
    )


def test_advantages_are_compared_within_a_state_so_a_value_of_the_state_does_not_count() -> None:
    measured = tried([1.0, 2.0, 11.0, 14.0], [0, 0, 1, 1])
    right = correlate("p", "fqe", measured, np.array([50.0, 51.0, -3.0, 1.0]), key=())
    assert (right.spearman, right.kendall, right.top_share, right.chance_share) == (1.0, 1.0, 1.0, 0.5)
    wrong = correlate("p", "fqe", measured, np.array([51.0, 50.0, 1.0, -3.0]), key=())
    assert (wrong.spearman, wrong.top_share) == (-1.0, 0.0)
    blind = correlate("p", "fqe", measured, np.array([0.0, 0.0, 5.0, 5.0]), key=())
    assert (blind.spearman, blind.spearman_low, blind.kendall) == (None, None, None)


def test_equal_returns_are_all_best_and_the_interval_is_over_env_seeds() -> None:
    rng = numpy_generator("branches test")
    values = rng.normal(size=60)
    measured = tried([*(values + rng.normal(size=60))], [i // 3 for i in range(60)])
    found = correlate("p", "fqe", measured, values, key=())
    assert found.spearman_low < found.spearman < found.spearman_high
    assert (found.num_states, found.num_actions, found.num_env_seeds) == (20, 60, 20)
    flat = correlate("p", "fqe", tried([1.0, 1.0, 1.0], [0, 0, 0]), np.array([1.0, 2.0, 3.0]), key=())
    assert (flat.top_share, flat.chance_share, flat.spearman) == (1.0, 1.0, None)


def test_planned_branches_try_the_policys_action_wait_and_others_from_different_states(
    logged: Logged, policy: LearnedPolicy
) -> None:
    greedy = replay_actions(build_controller(policy), logged)
    planned = plan_branches(
        logged, policy.model_copy(update={"sampled": True}), greedy, REWARDS, num_states=6, num_actions=3, key=("x",)
    )
    branches = [branch for plan in planned.plans for branch in plan.branches]
    assert len(branches) == len(planned.leaves) == 18
    assert {branch.then.role for branch in branches} == {"online"}
    assert not any(branch.then.controller.sampled for branch in branches)
    ids = {episode["episode_id"]: place for place, episode in enumerate(logged.episodes)}
    by_state: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for parent, step, action in planned.leaves.values():
        by_state.setdefault((parent, step), set()).add(action)
    assert len(by_state) == 6
    for (parent, step), actions in by_state.items():
        row = logged.first_E[ids[parent]] + step
        assert len(actions) == 3
        assert {(0,) * 8, tuple(greedy[row].tolist())} <= actions
    left = planned.leaves.values()
    (found,) = measured_branches(
        [MeasuredBranch(then="p", parent=p, step=s, action=a, measured=float(a[0])) for p, s, a in left], logged
    )
    assert (len(found.state_B), found.group_B.max()) == (18, 5)


def test_branches_are_refused_where_the_engine_would_run_other_parents(logged: Logged, policy: LearnedPolicy) -> None:
    greedy = replay_actions(build_controller(policy), logged)
    older = replace(logged, episodes=tuple(dict(e) | {"episode_id": f"old {i}"} for i, e in enumerate(logged.episodes)))
    with pytest.raises(SpecError, match="another version of the engine"):
        plan_branches(older, policy, greedy, REWARDS, num_states=2, num_actions=2, key=())


def test_stored_branches_compare_within_a_state_and_the_parent_counts_where_its_own_controller_went_on(
    logged: Logged,
) -> None:
    data = logged.transitions
    plain = [i for i, e in enumerate(logged.episodes) if e["epsilon"] == 0.0 and e["controller"] == "aggressive"]
    parent, others = plain[0], [i for i, e in enumerate(logged.episodes) if e["controller"] == "random"][:2]
    action_of = dict(zip(data.state_N.tolist(), data.action_NA.tolist()))

    def action(episode: int, step: int) -> list[int]:
        return action_of[int(logged.first_E[episode]) + step]

    step = next(s for s in range(8) if len({tuple(action(i, s)) for i in [parent, *others]}) == 3)
    for same in (True, False):
        episodes = [dict(episode) for episode in logged.episodes]
        for branch in others:
            episodes[branch] |= {"branch_parent": episodes[parent]["episode_id"], "branch_step": step}
            if same:
                names = ("controller", "controller_id", "controller_spec", "epsilon")
                episodes[branch] |= {name: episodes[parent][name] for name in names}
        (found,) = stored_branches(replace(logged, episodes=tuple(episodes)))
        expected = [*others, parent] if same else others
        assert found.then == ("aggressive" if same else "random")
        assert sorted(found.measured_B) == pytest.approx(sorted(logged.returns[expected]))
        assert sorted(found.action_BA.tolist()) == sorted(action(i, step) for i in expected)
        assert set(found.group_B) == {0}


# Ranking


def test_ranking_of_policies_by_hand() -> None:
    guess = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "unmet": 9.0}
    live = {"a": 1.0, "b": 3.0, "c": 4.0, "d": 0.0, "unvalued": 9.0}
    found = ranking_quality("here", guess, live, reference=0.5)
    assert found is not None
    assert (found.policies, found.live) == (("a", "b", "c", "d"), (1.0, 3.0, 4.0, 0.0))
    assert found.spearman == pytest.approx(stats.spearmanr([4, 3, 2, 1], [1, 3, 4, 0]).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau([4, 3, 2, 1], [1, 3, 4, 0]).statistic)
    assert found.regret_at == {1: 3.0, 3: 0.0}
    assert found.sharpe_at == {1: None, 3: pytest.approx(3.5 / np.std([1.0, 3.0, 4.0]))}
    assert found.live_range == 4.0
    assert ranking_quality("here", guess, {"a": 1.0, "b": 2.0}, reference=0.0) is None


def test_regret_and_sharpe_of_perfect_and_reversed_rankings() -> None:
    live = np.array([5.0, 1.0, 3.0])
    assert (regret_at(live, live, 1), regret_at(-live, live, 1), regret_at(-live, live, 3)) == (0.0, 4.0, 0.0)
    assert sharpe_at(live, live, 1.0, 2) == pytest.approx(4.0 / 1.0)
    assert sharpe_at(live, np.array([1.3, 1.3 + 3e-16, 1.3, 0.0]), 1.0, 3) is None


def test_a_missing_distribution_is_named(logged: Logged, tmp_path: Path) -> None:
    with seeded(0):
        network = TreeNet(NetworkSpec(hidden=8, slot_hidden=4, trunk="gru"))
    card = PolicyCard(name="g", algorithm="bc", network=network.spec, recipe={}, rewards={}, training_seed=0)
    recurrent = save_checkpoint(tmp_path / "g", network, card, sampled=True)
    with pytest.raises(SpecError, match="leave out --sampled"):
        policy_target(recurrent, logged)
    assert len(policy_target(recurrent.model_copy(update={"sampled": False}), logged).parts) == 1


def test_a_few_behaviours_are_of_as_many_rules_as_there_are(logged: Logged) -> None:
    behaviours = behaviours_of(logged)[0]
    names = [b.name for b in spread_out(behaviours, 3)]
    assert names == ["aggressive", "baseline ε 0.2", "random"]
    assert sorted(b.name for b in spread_out(behaviours, 99)) == sorted(b.name for b in behaviours)


def test_the_bundled_recipe_is_the_default() -> None:
    assert load("recipes", "fqe", FqeSpec) == FqeSpec()
