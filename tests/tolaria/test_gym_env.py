from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from engine_specs import REWARD, plan_of, tiny_environment
from gymnasium.utils.env_checker import check_env

from esper.leyline.actions import Action, Op
from esper.leyline.controller_specs import FixedSchedule, Plant
from esper.leyline.library import load_reward_of
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.rewards import combine
from esper.tolaria.gym_env import GrowthEnv, GrowthVectorEnv
from esper.tolaria.rollout import run_cohort

NAME = "esper.tolaria.gym_registration:esper/Growth-v0"


def test_gymnasiums_own_checker_accepts_the_environment():
    env = gymnasium.make(NAME, environment=tiny_environment(horizon=2, batches_per_epoch=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env.unwrapped)


@pytest.mark.parametrize(
    ("environment", "reward"), [("cifar16-real", "cifar16-real"), ("digits-mix-k333-narrow1", "digits-mix")]
)
def test_the_reward_that_is_left_out_is_the_environments_own(environment, reward):
    for env in (GrowthEnv(environment), GrowthVectorEnv(2, environment)):
        assert env._session.reward == load_reward_of(environment)
        assert env._session.reward.name == reward


def test_an_invalid_action_becomes_wait_and_says_so():
    env = gymnasium.make(NAME, environment=tiny_environment()).unwrapped
    _, info = env.reset(seed=4)
    assert bool(info["action_mask"][Op.GERMINATE])
    _, _, terminated, truncated, info = env.step(Action(op=Op.FOSSILIZE).to_row())
    assert (bool(info["executed"]), terminated, truncated) == (False, False, False)


def test_the_rewards_of_an_episode_are_those_of_the_stored_rows():
    spec = tiny_environment(batches_per_epoch=10)
    schedule = FixedSchedule(name="plan", plants=(Plant(slot=0, blueprint="conv_heavy"),))
    steps = run_cohort(plan_of([PlannedEpisode(controller=schedule)], spec, replicate=9))["steps"].to_pandas()[:-1]
    expected = combine(REWARD, steps["reward_accuracy_points"].to_numpy(), steps["reward_growth_log2"].to_numpy())
    env = gymnasium.make_vec(NAME, num_envs=2, environment=spec, reward=REWARD, vectorization_mode="vector_entry_point")
    env.reset(seed=9)
    columns = ["action_slot", *[c for c in steps.columns if c.startswith("action_") and c != "action_slot"]]
    got = []
    for _, row in steps.iterrows():
        action = np.array([Op[row["op"]], *row[columns]], dtype=np.int64)
        _, rewards, terminated, _, _ = env.step(np.stack([action, np.zeros(8, dtype=np.int64)]))
        got.append(rewards)
    assert terminated.all()
    np.testing.assert_allclose([r[0] for r in got], expected, atol=1e-9)
    assert [r[1] for r in got] == pytest.approx([0.0] * len(got))
    _, rewards, terminated, _, _ = env.step(np.zeros((2, 8), dtype=np.int64))
    assert not terminated.any()
