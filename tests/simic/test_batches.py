"""Transitions are what the rows say, whole and by environment seed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.actions import is_valid
from esper.leyline.errors import IntegrityError, SpecError, UnknownNameError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import from_steps, load_transitions
from esper.simic.replay import Replay, trajectory_probabilities
from esper.simic.returns import generalised_advantages, n_step
from esper.simic.splits import held_out_rows

REWARDS = {name: load("rewards", name, RewardSpec) for name in ("digits-gap", "digits-baseline")}


def sealed(folder: Path, *tables: dict[str, pa.Table]) -> Version:
    dataset = open_store(folder).dataset("small")
    for part in tables:
        dataset.commit(part)
    return dataset.seal(matrix_id="test", provenance={})


def test_one_transition_per_decision_with_valid_actions_and_returns_that_add_up(tmp_path: Path) -> None:
    tables = synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random", "schedule-sampler"))
    found = load_transitions(sealed(tmp_path, tables), "v4", REWARDS)
    steps = tables["steps"]
    assert len(found) == pc.sum(pc.invert(steps["is_last"])).as_py()
    assert is_valid(found.action_NA, found.mask_MT[found.state_N]).all()
    assert np.isfinite(found.obs_MV).all()
    reward = REWARDS["digits-gap"]
    points = steps["reward_accuracy_points"].fill_null(0).to_numpy()
    growth = steps["reward_growth_log2"].fill_null(0).to_numpy()
    expected = ((points - reward.rent_points * growth) / reward.scale_points).sum()
    assert found.reward_N.sum() == pytest.approx(expected)
    last = np.append(np.diff(found.episode_N) > 0, True)
    assert (found.discount_N == np.where(last, 0, 1)).all()
    for episode in range(found.episode_N.max() + 1):
        rows = found.episode_N == episode
        assert found.return_N[rows] == pytest.approx(found.reward_N[rows].sum())
    assert np.isnan(found.logp_N).any()
    assert (found.logp_N[~np.isnan(found.logp_N)] <= 0).all()


def test_replayed_rows_give_no_transition_but_count_for_the_return(tmp_path: Path) -> None:
    tables = synthetic_tables(num_env_seeds=1, behaviours=("baseline",), epsilons=(0.0,))
    whole = from_steps(tables["steps"], "v1", REWARDS)
    index = tables["steps"].column_names.index("replayed")
    replayed = pa.array(np.asarray(tables["steps"]["step"]) < 2)
    part = from_steps(tables["steps"].set_column(index, "replayed", replayed), "v1", REWARDS)
    assert len(part) == len(whole) - 2
    assert part.return_N[0] == whole.return_N[0]


def test_sparse_reward_pays_the_same_total_at_the_end() -> None:
    steps = synthetic_tables(num_env_seeds=1)["steps"]
    sparse = {"digits-gap": REWARDS["digits-gap"].model_copy(update={"mode": "sparse"})}
    found, dense = from_steps(steps, "v1", sparse), from_steps(steps, "v1", REWARDS)
    assert found.return_N == pytest.approx(dense.return_N)
    assert (found.reward_N[found.discount_N > 0] == 0).all()


@pytest.mark.parametrize("role", ["selection", "evaluation"])
def test_selection_and_evaluation_episodes_are_refused(tmp_path: Path, role: str) -> None:
    version = sealed(tmp_path, synthetic_tables(num_env_seeds=1, role=role))
    with pytest.raises(SpecError, match="not for learning"):
        load_transitions(version, "v1", REWARDS, roles=(role,))
    with pytest.raises(SpecError, match="no usable episode"):
        load_transitions(version, "v1", REWARDS)


def test_an_environment_without_a_reward_is_named() -> None:
    steps = synthetic_tables(num_env_seeds=1)["steps"]
    with pytest.raises(UnknownNameError, match="digits-gap"):
        from_steps(steps, "v1", {"digits-baseline": REWARDS["digits-baseline"]})


def test_contradicting_rows_are_refused() -> None:
    steps = synthetic_tables(num_env_seeds=1, behaviours=("baseline",), epsilons=(0.0,))["steps"]
    with pytest.raises(IntegrityError, match="not whole"):
        from_steps(steps.slice(1), "v1", REWARDS)
    index = steps.column_names.index("op")
    fossilize = pa.array([None if op is None else "FOSSILIZE" for op in steps["op"].to_pylist()])
    with pytest.raises(IntegrityError, match="not in their mask"):
        from_steps(steps.set_column(index, "op", fossilize), "v1", REWARDS)


def test_held_out_seeds_are_whole_few_and_the_same_in_every_environment() -> None:
    gap = synthetic_tables(num_env_seeds=8, behaviours=("baseline",), epsilons=(0.0,))
    plain = synthetic_tables(environment="digits-baseline", num_env_seeds=3, behaviours=("baseline",), epsilons=(0.0,))
    found = from_steps(concat_tables(gap, plain)["steps"], "v1", REWARDS)
    held = held_out_rows(found)
    seeds = set(found.env_seed_N[held])
    assert len(seeds) == 1
    assert not seeds & set(found.env_seed_N[~held])
    assert held_out_rows(found.select(found.environment_N == found.environments.index("digits-baseline"))).sum() == 0
    assert (held_out_rows(found) == held).all()


def test_n_step_rewards_add_up_and_stop_at_the_end_of_the_episode() -> None:
    found = from_steps(synthetic_tables(num_env_seeds=1)["steps"], "v1", REWARDS)
    gamma = 0.9
    folded = n_step(found, 3, gamma)
    for row in range(len(found)):
        total, factor, target = 0.0, 1.0, found.next_N[row]
        for ahead in range(row, min(row + 3, len(found))):
            if found.episode_N[ahead] != found.episode_N[row]:
                break
            total += factor * found.reward_N[ahead]
            factor *= gamma * found.discount_N[ahead]
            target = found.next_N[ahead]
        assert folded.reward_N[row] == pytest.approx(total)
        assert folded.discount_N[row] == pytest.approx(factor)
        assert folded.next_N[row] == target
    assert (n_step(found, 1, 1.0).reward_N == found.reward_N).all()


def test_gae_equals_the_double_sum() -> None:
    found = from_steps(synthetic_tables(num_env_seeds=1)["steps"], "v1", REWARDS)
    found.discount_N[-1] = 1.0
    rng = np.random.default_rng(0)
    value, after = rng.normal(size=len(found)), rng.normal(size=len(found))
    gamma, lam = 0.97, 0.9
    got = generalised_advantages(found, value, after, gamma=gamma, lam=lam)
    delta = found.reward_N + gamma * found.discount_N * after - value
    for row in range(len(found)):
        same = [k for k in range(row, len(found)) if found.episode_N[k] == found.episode_N[row]]
        assert got[row] == pytest.approx(sum((gamma * lam) ** (k - row) * delta[k] for k in same))


def test_sampling_is_keyed_and_return_weighting_follows_its_formula() -> None:
    found = from_steps(synthetic_tables(num_env_seeds=2)["steps"], "v1", REWARDS)
    first, second = (Replay(found, key=("a", 1)).sample(32) for _ in range(2))
    names = ("obs", "mask", "action", "reward", "discount", "next_obs", "next_mask", "forced", "weight", "to_go")
    assert all((getattr(first, name) == getattr(second, name)).all() for name in names)
    probability = trajectory_probabilities(found, 0.1)
    assert probability.sum() == pytest.approx(1.0)
    scaled = (found.return_N - found.return_N.min()) / np.ptp(found.return_N)
    _, lengths = np.unique(found.episode_N, return_counts=True)
    expected = np.exp(scaled / 0.1) / lengths[found.episode_N]
    np.testing.assert_allclose(probability, expected / expected.sum())
    with pytest.raises(SpecError, match="no transition"):
        Replay(found.select(np.zeros(len(found), dtype=bool)), key=("a", 1))
