"""The measured facts that the demo's controls stand on, at full size: minutes."""

from __future__ import annotations

import numpy as np
import pytest
from engine_specs import plan_of
from scipy import stats

from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant
from esper.leyline.library import load
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.rollout import run_cohort

pytestmark = pytest.mark.slow

NUM_SEEDS = 6


def heavy(*slots: int) -> PlannedEpisode:
    plants = tuple(Plant(slot=slot, blueprint="conv_heavy") for slot in slots)
    return PlannedEpisode(controller=FixedSchedule(name=f"heavy-{slots}", plants=plants))


@pytest.fixture(scope="module")
def gaps() -> tuple[np.ndarray, np.ndarray]:
    """Never-act's test accuracy [seeds] and paired gains [seeds, slots and all], percent and points."""
    spec = load("environments", "digits-gap", EnvironmentSpec)
    arms = [PlannedEpisode(controller=NeverAct()), heavy(0), heavy(1), heavy(2), heavy(0, 1, 2)]
    rows = []
    for replicate in range(900, 900 + NUM_SEEDS):
        plan = plan_of(arms, spec, replicate)
        episodes = run_cohort(plan)["episodes"].to_pandas().set_index("episode_id")
        rows.append(100 * episodes.loc[plan.episode_ids(), "final_test_accuracy"].to_numpy())
    accuracy = np.array(rows)
    return accuracy[:, 0], accuracy[:, 1:] - accuracy[:, :1]


def test_never_acting_on_digits_gap_lies_where_it_was_measured(gaps):
    assert 22 <= gaps[0].mean() <= 36


def test_one_heavy_seed_in_the_first_slot_is_worth_about_twenty_points(gaps):
    gain = gaps[1][:, 0]
    low, _ = stats.t.interval(0.95, NUM_SEEDS - 1, gain.mean(), stats.sem(gain))
    assert 14 <= gain.mean() <= 28
    assert low > 10


def test_the_last_slot_of_this_host_gains_next_to_nothing(gaps):
    assert abs(gaps[1][:, 2].mean()) < 4
