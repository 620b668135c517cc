"""What importance weights are worth: effective sample sizes by horizon (Kong 1992).

    rho_t = pi(a_t | s_t) / mu(a_t | s_t),   w_t = product of rho up to t,   ESS_t = (sum of w_t)**2 / sum of w_t**2

over episodes. After an episode has ended its weight stays. Shape suffixes: E episodes, H decisions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

USABLE = 50.0
"""Effective episodes at which a horizon counts as usable."""


def weights(log_ratio_EH: Floats) -> Floats:
    """Return importance weights after each decision, each column scaled to a largest of 1 (all 0 where none is left).

    Args:
        log_ratio_EH: log pi - log mu of each decision, -inf where pi never does it; 0 after the end of an episode.
    """
    total = log_ratio_EH.cumsum(axis=1)
    largest = total.max(axis=0)
    scaled: Floats = np.exp(total - np.where(np.isfinite(largest), largest, 0.0))
    return scaled


def effective_episodes(log_ratio_EH: Floats) -> Floats:
    """Return ESS_t after each decision, [H]; 0 where no episode is one that the policy could have made."""
    w = weights(log_ratio_EH)
    square = (w**2).sum(axis=0)
    return np.where(square > 0, w.sum(axis=0) ** 2 / np.where(square > 0, square, 1.0), 0.0)


def usable_decisions(effective_H: Floats, least: float = USABLE) -> int:
    """Return the number of decisions up to which at least `least` effective episodes are left."""
    enough = effective_H >= least
    return int(len(enough) if enough.all() else enough.argmin())
