"""What the propensities can carry: calibration of the op probabilities, and the effective sample size by horizon.

The target of the effective sample size is u, the hierarchical uniform policy: it needs no checkpoint, and a dataset
that cannot carry even u for a few steps carries no learned policy either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
from numpy.typing import NDArray

from quality.measures import WHOLE, Measure, rows

NUM_BINS = 10
MIN_CALIBRATED = 200
"""Predictions below which a calibration says nothing."""
NOISE_ERRORS = 3.0
"""Standard errors of a bin that are taken for noise."""
USABLE = 50
"""Effective episodes at which a horizon counts as usable."""

Floats = NDArray[np.float64]


@dataclass
class Calibration:
    """Of predicted op probabilities by decile: their number, sum, variance and how often the op was taken."""

    num: Floats = field(default_factory=lambda: np.zeros(NUM_BINS))
    predicted: Floats = field(default_factory=lambda: np.zeros(NUM_BINS))
    variance: Floats = field(default_factory=lambda: np.zeros(NUM_BINS))
    taken: Floats = field(default_factory=lambda: np.zeros(NUM_BINS))

    def add(self, predicted: Floats, taken: NDArray[np.bool_]) -> None:
        """Count predictions in (0, 1) against whether what they predict happened."""
        index = np.minimum((predicted * NUM_BINS).astype(int), NUM_BINS - 1)
        weights = (None, predicted, predicted * (1 - predicted), taken.astype(np.float64))
        for total, weight in zip((self.num, self.predicted, self.variance, self.taken), weights):
            np.add(total, np.bincount(index, weights=weight, minlength=NUM_BINS), out=total)

    def __add__(self, other: Calibration) -> Calibration:
        """Return the counts of both."""
        return Calibration(
            self.num + other.num,
            self.predicted + other.predicted,
            self.variance + other.variance,
            self.taken + other.taken,
        )

    def error(self) -> tuple[float, float]:
        """Return the expected calibration error, and the part of it beyond three standard errors of each bin."""
        total = self.num.sum()
        gap = np.abs(self.taken - self.predicted)
        excess = np.maximum(gap - NOISE_ERRORS * np.sqrt(self.variance), 0)
        return float(gap.sum() / total), float(excess.sum() / total)


def calibration(parts: Mapping[str, Calibration], names: Sequence[str]) -> list[Measure]:
    """Return `propensity_calibration` of the whole dataset and of every environment."""
    out = []
    for name in (WHOLE, *names):
        sums = sum((part for place, part in parts.items() if name in (WHOLE, place)), Calibration())
        value, message = None, f"fewer than {MIN_CALIBRATED} op probabilities between 0 and 1"
        if sums.num.sum() >= MIN_CALIBRATED:
            plain, value = sums.error()
            message = f"calibration error beyond noise; {plain:.4f} with noise, {sums.num.sum():.0f} op probabilities"
        out.append(Measure(check="propensity_calibration", environment=name, value=value, message=message))
    return out


@dataclass(frozen=True, slots=True)
class EssCurve:
    """The effective sample size of u after each decision in one environment, float64 [H] each.

    Attributes:
        episodes: Episodes as the unit.
        env_seeds: Env_seeds as the unit: their episodes' weights added up.
        num_episodes: Episodes with known propensities throughout.
        num_env_seeds: Their env_seeds.
    """

    episodes: Floats
    env_seeds: Floats
    num_episodes: int
    num_env_seeds: int

    @property
    def usable(self) -> int:
        """The number of decisions up to which at least 50 effective episodes are left."""
        enough = self.episodes >= USABLE
        return int(len(enough) if enough.all() else enough.argmin())


def ess_curves(connection: duckdb.DuckDBPyConnection, ratios: Mapping[str, NDArray[np.generic]]) -> dict[str, EssCurve]:
    """Return the curve of each environment that has episodes of role data with known propensities.

    Args:
        connection: With the working tables.
        ratios: `number` (of the episode), `step` and `log_ratio` (log u - log mu, NaN unknown) of every decision.
    """
    episodes = rows(
        connection.sql(
            "SELECT number, environment, env_seed, num_steps FROM health_episodes "
            "WHERE sound AND role = 'data' AND branch_parent IS NULL AND num_steps > 0 ORDER BY number"
        )
    )
    if not episodes:
        return {}
    number = np.array([row["number"] for row in episodes])
    length = np.array([row["num_steps"] for row in episodes])
    place = np.array([row["environment"] for row in episodes])
    seed = np.array([row["env_seed"] for row in episodes])
    at = np.searchsorted(number, ratios["number"])
    here = (at < len(number)) & (number[np.minimum(at, len(number) - 1)] == ratios["number"])
    logs = np.where(np.arange(length.max()) < length[:, None], np.nan, 0.0)
    logs[at[here], ratios["step"][here]] = ratios["log_ratio"][here]
    known = np.isfinite(logs).all(axis=1)
    out = {}
    for name in np.unique(place[known]):
        of = known & (place == name)
        total = logs[of][:, : length[of].max()].cumsum(axis=1)
        weights = np.exp(total - total.max(axis=0))
        clusters = np.unique(seed[of], return_inverse=True)[1].ravel()
        by_seed = np.zeros((clusters.max() + 1, weights.shape[1]))
        np.add.at(by_seed, clusters, weights)
        out[str(name)] = EssCurve(_ess(weights), _ess(by_seed), int(of.sum()), len(by_seed))
    return out


def _ess(weights: Floats) -> Floats:
    result: Floats = weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)
    return result


def effective_sizes(curves: Mapping[str, EssCurve], names: Sequence[str]) -> list[Measure]:
    """Return `effective_sample_size` of every environment: the horizon up to which 50 effective episodes are left."""
    out = []
    for name in names:
        curve = curves.get(name)
        value, message = None, "no episode of role data has known propensities throughout"
        if curve is not None:
            value = float(curve.usable)
            at = sorted({0, len(curve.episodes) // 4, len(curve.episodes) // 2, len(curve.episodes) - 1})
            told = ", ".join(f"{curve.episodes[t]:.0f} ({curve.env_seeds[t]:.1f}) after {t + 1}" for t in at)
            message = (
                f"decisions that keep {USABLE} effective episodes for the target u; of {curve.num_episodes} episodes "
                f"({curve.num_env_seeds} env_seeds): {told}"
            )
        out.append(Measure(check="effective_sample_size", environment=name, value=value, message=message))
    return out
