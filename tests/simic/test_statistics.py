import numpy as np
import pytest
from scipy import stats

from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.keys import numpy_generator
from esper.simic.statistics import NUM_RESAMPLES, mean_interval, paired_interval

KEY = ("test",)


def sample(num, *, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, num)


def test_below_twenty_seeds_the_interval_is_scipys_paired_t():
    left, right = sample(12), sample(12, seed=1)
    found = paired_interval(left, right, key=KEY)
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((left - right).mean())
    assert (found.method, found.num_env_seeds) == ("paired t", 12)


def test_from_twenty_seeds_the_interval_is_scipys_bca_with_the_keyed_draws():
    left, right = sample(20) ** 2, sample(20, seed=1)
    found = paired_interval(left, right, key=KEY)
    expected = stats.bootstrap(
        (left - right,), np.mean, n_resamples=NUM_RESAMPLES, method="BCa", rng=numpy_generator("bootstrap", *KEY)
    ).confidence_interval
    assert found.method == "BCa"
    assert NUM_RESAMPLES >= 9999
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_bootstrap_is_the_same_twice_and_depends_on_its_key():
    values = sample(25) ** 2
    assert mean_interval(values, key=("a",)) == mean_interval(values, key=("a",))
    assert mean_interval(values, key=("a",)) != mean_interval(values, key=("b",))


def test_bca_leans_towards_the_long_tail_of_skewed_values():
    found = mean_interval(np.random.default_rng(0).exponential(1.0, 30), key=KEY)
    assert found.high - found.mean > found.mean - found.low


@pytest.mark.parametrize("num", [2, 19, 20, 40])
def test_equal_differences_have_an_interval_of_width_zero(num):
    found = paired_interval(np.full(num, 3.5), np.full(num, 1.5), key=KEY)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)


def test_values_that_are_equal_but_for_one_seed_have_a_finite_interval():
    values = np.zeros(20)
    values[3] = 1.0
    found = mean_interval(values, key=KEY)
    assert np.isfinite([found.low, found.high]).all()
    assert found.low <= found.mean <= found.high


@pytest.mark.parametrize("values", [[], [1.0], 1.0, [[1.0, 2.0]]])
def test_fewer_than_two_seeds_are_refused(values):
    with pytest.raises(SpecError, match="at least two"):
        mean_interval(values, key=KEY)


def test_unpaired_seeds_are_refused():
    with pytest.raises(SpecError, match="same environment seeds"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0], key=KEY)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(IntegrityError, match="1 of 3"):
        mean_interval([1.0, float("nan"), 2.0], key=KEY)


@pytest.mark.parametrize(("num", "draw", "truth"), [(8, "normal", 0.0), (25, "exponential", 1.0)])
def test_about_95_percent_of_intervals_hold_the_truth(num, draw, truth):
    generator = np.random.default_rng(7)
    held = 0
    for trial in range(300):
        found = mean_interval(getattr(generator, draw)(size=num), key=("coverage", trial))
        held += found.low <= truth <= found.high
    assert 0.90 <= held / 300 <= 0.985
