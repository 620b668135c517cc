"""Intervals over environment seeds: the unit of independence, since the episodes of one cohort share rows.

Sources: Student's paired t; bias-corrected and accelerated bootstrap, Efron 1987, in SciPy's implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from esper.leyline.comparison import Interval
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.keys import KeyPart, numpy_generator

CONFIDENCE = 0.95
MIN_BOOTSTRAP_SEEDS = 20
"""From here on the bootstrap has enough seeds to see the shape of the distribution."""

NUM_RESAMPLES = 9999

EQUAL_WITHIN = 1e-12
"""Differences of equal accuracies differ in the last bits; a spread of this relative size is none."""


def mean_interval(values: ArrayLike, *, key: Sequence[KeyPart]) -> Interval:
    """Return the mean of one number per environment seed with its 95 % interval.

    Student's t below 20 seeds, BCa from 20. Equal values have an interval of width zero.

    Args:
        values: One number per environment seed, [N].
        key: Names the comparison; the bootstrap's draws depend on it and on nothing else.

    Raises:
        SpecError: Fewer than two environment seeds.
        IntegrityError: A value is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise SpecError(
            f"an interval over values of shape {sample.shape} was asked for\n"
            "  expected: one value per environment seed, at least two seeds"
        )
    if not np.isfinite(sample).all():
        raise IntegrityError(f"{int((~np.isfinite(sample)).sum())} of {len(sample)} values are not finite: {key}")
    if np.ptp(sample) <= EQUAL_WITHIN * max(1.0, abs(float(sample[0]))):
        method = "BCa" if len(sample) >= MIN_BOOTSTRAP_SEEDS else "paired t"
        centre = float(sample[0])
        return Interval(mean=centre, low=centre, high=centre, num_env_seeds=len(sample), method=method)
    if len(sample) >= MIN_BOOTSTRAP_SEEDS:
        low, high = _bca(sample, key)
        if np.isfinite(low) and np.isfinite(high):
            return Interval(mean=float(sample.mean()), low=low, high=high, num_env_seeds=len(sample), method="BCa")
    low, high = _student(sample)
    return Interval(mean=float(sample.mean()), low=low, high=high, num_env_seeds=len(sample), method="paired t")


def paired_interval(values: ArrayLike, reference: ArrayLike, *, key: Sequence[KeyPart]) -> Interval:
    """Return the mean of the differences `values - reference`, paired by position, with its 95 % interval.

    Args:
        values: One number per environment seed, [N].
        reference: The other arm's on the same seeds in the same order, [N].
        key: Names the comparison, see `mean_interval`.

    Raises:
        SpecError: The two do not have the same shape, or fewer than two environment seeds.
        IntegrityError: A value is not finite.
    """
    left, right = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if left.shape != right.shape:
        raise SpecError(
            f"values of shape {left.shape} cannot be paired with {right.shape}\n  expected: the same environment seeds"
        )
    return mean_interval(left - right, key=key)


def _student(sample: NDArray[np.float64]) -> tuple[float, float]:
    interval = stats.ttest_1samp(sample, 0.0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def _bca(sample: NDArray[np.float64], key: Sequence[KeyPart]) -> tuple[float, float]:
    result = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=numpy_generator("bootstrap", *key),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
