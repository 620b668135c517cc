"""Weighted doubly robust estimates (Thomas & Brunskill 2016, eq. 7) with gamma 1, the cross-check of fitted values.

    WDR = sum over t and episodes i of  w_t^i (r_t^i - Q(s_t^i, a_t^i)) + w_(t-1)^i V(s_t^i)

with w_t^i = rho_(0:t)^i / sum over j of rho_(0:t)^j and w_(-1)^i = 1 / n. Once no episode is left that the policy could
have made, all later weights are 0: from there on V alone speaks. Shape suffixes: E episodes, H decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.keys import KeyPart, numpy_generator
from esper.leyline.ope import ValueEstimate
from esper.simic.ope.effective_samples import weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_RESAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedEpisodes:
    """Episodes with known propensities throughout, padded with zeros after their end.

    Attributes:
        log_ratio_EH: log pi - log mu of each decision.
        reward_EH: Rewards.
        q_EH: Q(s_t, a_t).
        v_EH: E_pi[Q(s_t, .)].
        env_seed_E: The env_seed, what is resampled.
    """

    log_ratio_EH: Floats
    reward_EH: Floats
    q_EH: Floats
    v_EH: Floats
    env_seed_E: Ints


def weighted_doubly_robust(episodes: WeightedEpisodes, count_E: Floats | None = None) -> float:
    """Return the estimate; `count_E` is how often each episode counts (once unless given)."""
    count = np.ones(len(episodes.reward_EH)) if count_E is None else count_E
    w = count[:, None] * weights(episodes.log_ratio_EH)
    total = w.sum(axis=0)
    w = np.where(total > 0, w / np.where(total > 0, total, 1.0), 0.0)
    before = np.concatenate([(count / count.sum())[:, None], w[:, :-1]], axis=1)
    return float((w * (episodes.reward_EH - episodes.q_EH) + before * episodes.v_EH).sum())


def wdr_estimate(groups: Sequence[WeightedEpisodes], *, key: Sequence[KeyPart]) -> ValueEstimate:
    """Return the mean over groups (environments) of their estimates, with a 95 % percentile interval.

    Env_seeds are resampled, in all groups alike; the fitted values stay as they are. A group of which no env_seed was
    drawn counts with all of its episodes.
    """
    seeds = np.unique(np.concatenate([group.env_seed_E for group in groups]))
    generator = numpy_generator("wdr", *key)
    replicates = np.empty(NUM_RESAMPLES)
    for replicate in range(NUM_RESAMPLES):
        drawn = np.bincount(generator.integers(len(seeds), size=len(seeds)), minlength=len(seeds))
        found = []
        for group in groups:
            count = drawn[np.searchsorted(seeds, group.env_seed_E)].astype(np.float64)
            found.append(weighted_doubly_robust(group, count if count.any() else None))
        replicates[replicate] = np.mean(found)
    low, high = np.quantile(replicates, [0.025, 0.975])
    centre = float(np.mean([weighted_doubly_robust(group) for group in groups]))
    return ValueEstimate(mean=centre, low=float(low), high=float(high))
