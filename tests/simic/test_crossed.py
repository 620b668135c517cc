"""Intervals over controller seeds and environment seeds: against loops, and coverage on simulated data."""

import numpy as np
import pytest
from scipy import stats

from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.keys import numpy_generator
from esper.simic import crossed
from esper.simic.crossed import crossed_interval, interquartile_mean


def sample(key, num_k=6, num_e=8, sd_k=1.0, sd_e=1.0, sd=0.5):
    generator = numpy_generator("sample", key)
    rows, columns = sd_k * generator.standard_normal((num_k, 1)), sd_e * generator.standard_normal((1, num_e))
    return rows + columns + sd * generator.standard_normal((num_k, num_e))


def test_interquartile_mean_is_scipys_trimmed_mean():
    values = np.arange(20.0) ** 2
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25))
    assert interquartile_mean([*[1.0] * 6, 100.0, -100.0]) == 1.0


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_resamples_are_those_of_a_loop_that_draws_rows_and_columns_apart(statistic, monkeypatch):
    monkeypatch.setattr(crossed, "NUM_CROSSED_RESAMPLES", 50)
    values = sample("loop")
    drawn = crossed._resampled(values, numpy_generator("draws"), statistic)
    generator = numpy_generator("draws")
    rows, columns = generator.integers(6, size=(50, 6)), generator.integers(8, size=(50, 8))
    fold = np.mean if statistic == "mean" else (lambda part: stats.trim_mean(part, 0.25, axis=None))
    expected = [fold(values[np.ix_(row, column)].ravel()) for row, column in zip(rows, columns)]
    np.testing.assert_allclose(drawn, expected, rtol=1e-12)


def test_an_interval_over_both_is_wider_than_over_either_alone():
    values = sample("wide", 10, 10)
    both = crossed_interval(values, key=("x",))
    rows = np.ptp(np.quantile(values.mean(axis=1), [0.025, 0.975])) / np.sqrt(10)
    columns = np.ptp(np.quantile(values.mean(axis=0), [0.025, 0.975])) / np.sqrt(10)
    assert both.high - both.low > max(rows, columns)
    assert (both.num_controller_seeds, both.num_env_seeds, both.method) == (10, 10, "crossed bootstrap")
    assert both.mean == pytest.approx(values.mean())


def test_ten_by_ten_seeds_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(crossed, "NUM_CROSSED_RESAMPLES", 500)
    found = [crossed_interval(sample(i, 10, 10), key=(i,)) for i in range(200)]
    assert 0.88 <= np.mean([interval.low <= 0.0 <= interval.high for interval in found]) <= 1.0


def test_the_draws_depend_on_the_key_alone():
    values = sample("key")
    assert crossed_interval(values, key=("a",)) == crossed_interval(values, key=("a",))
    assert crossed_interval(values, key=("a",)) != crossed_interval(values, key=("b",))


def test_bad_samples_are_refused():
    with pytest.raises(SpecError, match="two of each"):
        crossed_interval(np.ones((1, 5)), key=("x",))
    with pytest.raises(IntegrityError, match="not finite"):
        crossed_interval(np.array([[1.0, np.nan], [1.0, 2.0]]), key=("x",))
