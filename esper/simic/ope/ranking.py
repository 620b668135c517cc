"""How well estimates rank: correlations, regret@k and SharpeRatio@k of policies, correlations of advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from esper.leyline.ope import RankingQuality

Floats = NDArray[np.float64]

FEWEST_POLICIES = 3
"""Below this number of policies a rank correlation says nothing."""

TOP = (1, 3)


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's rank correlation, None where one side is constant or there are fewer than two pairs."""
    return _correlation(stats.spearmanr, x, y)


def kendall(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Kendall's tau-b, None where one side is constant or there are fewer than two pairs."""
    return _correlation(stats.kendalltau, x, y)


def _correlation(function: Callable[[Floats, Floats], Any], x: ArrayLike, y: ArrayLike) -> float | None:
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    value = float(function(left, right).statistic)
    return value if np.isfinite(value) else None


def regret_at(estimate: Floats, live: Floats, k: int) -> float:
    """Return the best live return minus the best among the k highest estimates (0 is perfect)."""
    top = np.argsort(-estimate, kind="stable")[:k]
    return float(live.max() - live[top].max())


def sharpe_at(estimate: Floats, live: Floats, reference: float, k: int) -> float | None:
    """Return (best live return among the k highest estimates - reference) / their standard deviation.

    SharpeRatio@k of Kiyohara et al. 2023; None where the returns are one policy's or equal but for rounding.
    """
    chosen = live[np.argsort(-estimate, kind="stable")[:k]]
    if np.allclose(chosen, chosen[0], rtol=1e-12, atol=1e-12):
        return None
    return float((chosen.max() - reference) / chosen.std())


def ranking_quality(
    environment: str, estimates: Mapping[str, float], live: Mapping[str, float], reference: float
) -> RankingQuality | None:
    """Return how well the estimates rank the policies that have both; None for fewer than FEWEST_POLICIES.

    Args:
        environment: Where the returns are from.
        estimates: Off-policy estimates by policy.
        live: Mean live returns by policy.
        reference: The data's mean return.
    """
    names = [name for name in estimates if name in live]
    if len(names) < FEWEST_POLICIES:
        return None
    names.sort(key=lambda name: -estimates[name])
    guess, true = np.array([estimates[n] for n in names]), np.array([live[n] for n in names])
    tops: Sequence[int] = [k for k in TOP if k < len(names)]
    return RankingQuality(
        environment=environment,
        policies=tuple(names),
        estimates=tuple(guess.tolist()),
        live=tuple(true.tolist()),
        spearman=spearman(guess, true),
        kendall=kendall(guess, true),
        regret_at={k: regret_at(guess, true, k) for k in tops},
        live_range=float(np.ptp(true)),
        sharpe_at={k: sharpe_at(guess, true, reference, k) for k in tops},
    )
