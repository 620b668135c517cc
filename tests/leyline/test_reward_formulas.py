"""Rewards on an episode computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from esper.leyline.rewards import EpisodeColumns, RewardSpec, combine, reward_components

GAIN = RewardSpec(name="g", rent_points=3.0, scale_points=9.0)
SPARSE = RewardSpec(name="s", mode="sparse", rent_points=3.0, scale_points=9.0)


def by_hand() -> EpisodeColumns:
    """Three decisions: a seed as big as the host is born at 0, blended at 1, committed at 2."""
    return EpisodeColumns(
        val_accuracy=np.array([0.20, 0.25, 0.40, 0.50]),
        control_val_accuracy=np.array([0.20, 0.25, 0.30, 0.30]),
        seed_params=np.array([0.0, 100.0, 100.0, 100.0]),
        host_params=100.0,
        final_val_accuracy=0.48,
        control_final_val_accuracy=0.32,
        final_seed_params=300.0,
    )


def test_components_are_the_changes_of_paired_accuracy_and_growth():
    accuracy, growth = reward_components(by_hand())
    np.testing.assert_allclose(accuracy, [0.0, 10.0, 6.0])
    np.testing.assert_allclose(growth, [1.0, 0.0, 1.0])


def test_gain_charges_rent_and_divides_by_the_scale():
    np.testing.assert_allclose(combine(GAIN, *reward_components(by_hand())), [-3 / 9, 10 / 9, 3 / 9])


def test_the_return_telescopes_to_the_final_paired_gain_minus_rent():
    total = combine(GAIN, *reward_components(by_hand())).sum()
    assert total == pytest.approx((100 * (0.48 - 0.32) - 3 * np.log2(1 + 300 / 100)) / 9)
    jittered = replace(by_hand(), val_accuracy=np.array([0.20, 0.9, 0.1, 0.7]))
    assert combine(GAIN, *reward_components(jittered)).sum() == pytest.approx(total)


def test_sparse_pays_the_same_total_at_the_last_step_alone():
    components = reward_components(by_hand())
    sparse = combine(SPARSE, *components)
    np.testing.assert_array_equal(sparse[:-1], 0.0)
    assert sparse[-1] == pytest.approx(combine(GAIN, *components).sum())


def test_never_acting_earns_exactly_zero():
    accuracy = np.array([0.13, 0.3, 0.271, 0.333])
    never = EpisodeColumns(
        val_accuracy=accuracy,
        control_val_accuracy=accuracy.copy(),
        seed_params=np.zeros(4),
        host_params=77.0,
        final_val_accuracy=0.319,
        control_final_val_accuracy=0.319,
        final_seed_params=0.0,
    )
    for spec in (GAIN, SPARSE):
        assert (combine(spec, *reward_components(never)) == 0.0).all()


def test_the_columns_given_are_left_as_they_were():
    episode = by_hand()
    reward_components(episode)
    np.testing.assert_array_equal(episode.val_accuracy, by_hand().val_accuracy)
    np.testing.assert_array_equal(episode.seed_params, by_hand().seed_params)
