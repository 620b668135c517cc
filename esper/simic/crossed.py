"""Intervals for an algorithm: its controller seeds and the environment seeds are both samples, and they are crossed.

Every policy met every environment seed, so both margins are drawn anew, independently: the bootstrap for crossed random
effects, Owen 2007 ("The pigeonhole bootstrap"); its variance is at least the true one. The interquartile mean and its
stratified bootstrap are those of Agarwal et al. 2021 (rliable). Shape suffixes: K controller seeds, E environment
seeds, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from esper.leyline.comparison import Interval
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.keys import KeyPart, numpy_generator
from esper.simic.statistics import CONFIDENCE

NUM_CROSSED_RESAMPLES = 4_999
TRIMMED = 0.25
"""Share cut off on each side by the interquartile mean."""

Statistic = Literal["mean", "iqm"]
Floats = NDArray[np.float64]


def interquartile_mean(values: ArrayLike) -> Floats:
    """Return the mean of the middle half along the last axis."""
    trimmed: Floats = np.asarray(stats.trim_mean(values, TRIMMED, axis=-1))
    return trimmed


def crossed_interval(values_KE: ArrayLike, *, key: Sequence[KeyPart], statistic: Statistic = "mean") -> Interval:
    """Return the mean or interquartile mean over both kinds of seeds, with its 95 % percentile interval.

    Args:
        values_KE: One number per controller seed and environment seed, [K, E].
        key: Names the comparison; the draws depend on it and on nothing else.
        statistic: What is estimated.

    Raises:
        SpecError: Fewer than two controller seeds or fewer than two environment seeds.
        IntegrityError: A value is not finite.
    """
    sample = np.asarray(values_KE, dtype=np.float64)
    if sample.ndim != 2 or min(sample.shape) < 2:
        raise SpecError(
            f"an interval over values of shape {sample.shape} was asked for\n"
            "  expected: one row per controller seed and one column per environment seed, two of each at least"
        )
    if not np.isfinite(sample).all():
        raise IntegrityError(f"{int((~np.isfinite(sample)).sum())} of {sample.size} values are not finite: {key}")
    estimate = sample.mean() if statistic == "mean" else interquartile_mean(sample.ravel())
    drawn = _resampled(sample, numpy_generator("crossed", statistic, *key), statistic)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(
        mean=float(estimate),
        low=float(low),
        high=float(high),
        num_env_seeds=sample.shape[1],
        method="crossed bootstrap",
        num_controller_seeds=sample.shape[0],
    )


def _resampled(sample_KE: Floats, generator: np.random.Generator, statistic: Statistic) -> Floats:
    """The statistic of each resample, [B]."""
    num_k, num_e = sample_KE.shape
    drawn_BK = generator.integers(num_k, size=(NUM_CROSSED_RESAMPLES, num_k))
    drawn_BE = generator.integers(num_e, size=(NUM_CROSSED_RESAMPLES, num_e))
    if statistic == "iqm":
        resamples = sample_KE[drawn_BK[:, :, None], drawn_BE[:, None, :]]
        return interquartile_mean(resamples.reshape(NUM_CROSSED_RESAMPLES, -1))
    weights_BK = np.stack([(drawn_BK == k).mean(axis=1) for k in range(num_k)], axis=1)
    weights_BE = np.stack([(drawn_BE == e).mean(axis=1) for e in range(num_e)], axis=1)
    means: Floats = ((weights_BK @ sample_KE) * weights_BE).sum(axis=1)
    return means
