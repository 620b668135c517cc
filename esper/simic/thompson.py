"""Thompson sampling among arms that share levers, with a Gaussian posterior and one noise estimate for all.

The value of an arm is a sum of parts that it shares with others and a part of its own; each part is Gaussian a priori,
so the posterior is exact (Gaussian process regression on a finite set, Rasmussen and Williams 2006, eq. 2.25 and 2.26;
Thompson 1933, Russo et al. 2018, section 4). The noise variance is pooled over all arms: squared residuals over
observations minus effective parameters (MacKay 1992, eq. 4.9). Shape suffixes: A arms, N observations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from esper.leyline.keys import KeyPart, numpy_generator

Floats = NDArray[np.float64]

PRIOR_OBSERVATIONS = 3.0
"""What the first guess of the noise weighs."""

MAX_NOISE_ROUNDS = 50
NOISE_TOLERANCE = 1e-6
JITTER = 1e-9


def shared_covariance(levers_AL: NDArray[np.int64], shares: Sequence[tuple[tuple[int, ...], float]]) -> Floats:
    """Return the prior covariance of arms, [A, A].

    Args:
        levers_AL: The setting of each lever of each arm, int64 [A, L].
        shares: Sets of levers and their share of the variance: arms that agree on all levers of a set share it. The
            empty set is what all arms have in common, the set of all levers an arm's own.
    """
    covariance = np.zeros((len(levers_AL), len(levers_AL)))
    for levers, share in shares:
        columns = levers_AL[:, list(levers)]
        covariance += share * (columns[:, None] == columns[None]).all(axis=2)
    return covariance


class Thompson:
    """Beliefs about arms whose episodes come from several contexts in rotation.

    A context (a member of a family) shifts all arms alike; the choice of an arm never looks at it.
    """

    def __init__(self, prior_AA: Floats, *, prior_sd: float, noise_sd: float, num_contexts: int) -> None:
        self._prior = prior_AA * prior_sd**2
        self._context_variance = prior_sd**2 if num_contexts > 1 else 0.0
        self._guess = noise_sd**2
        self._noise = noise_sd**2
        self._arms: list[int] = []
        self._contexts: list[int] = []
        self._values: list[float] = []

    @property
    def noise_sd(self) -> float:
        """The present estimate of the spread of one observation."""
        return float(np.sqrt(self._noise))

    def times_pulled(self) -> NDArray[np.int64]:
        """Return how often each arm was observed, int64 [A]."""
        return np.bincount(self._arms, minlength=len(self._prior)).astype(np.int64)

    def observe(self, arm: int, context: int, value: float) -> None:
        """Add what one episode of an arm came to."""
        self._arms.append(arm)
        self._contexts.append(context)
        self._values.append(value)

    def posterior(self) -> tuple[Floats, Floats]:
        """Return the mean [A] and the covariance [A, A] of the arms' values; the noise is estimated anew."""
        if not self._values:
            return np.zeros(len(self._prior)), self._prior
        arms, contexts, values = np.array(self._arms), np.array(self._contexts), np.array(self._values)
        signal = self._prior[np.ix_(arms, arms)] + self._context_variance * (contexts[:, None] == contexts)
        self._noise = self._pooled_noise(signal, values)
        factor = cho_factor(signal + self._noise * np.eye(len(values)), lower=True)
        across = self._prior[:, arms]
        mean: Floats = across @ cho_solve(factor, values)
        covariance: Floats = self._prior - across @ cho_solve(factor, across.T)
        return mean, covariance

    def choose(self, num_pulls: int, *, key: Sequence[KeyPart]) -> list[int]:
        """Return the arms to pull next: each is the best one of a draw from the posterior, keyed by its place."""
        mean, covariance = self.posterior()
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.clip(values, JITTER, None))
        draws = [numpy_generator("thompson", *key, pull).standard_normal(len(mean)) for pull in range(num_pulls)]
        return [int(np.argmax(mean + root @ draw)) for draw in draws]

    def _pooled_noise(self, signal_NN: Floats, values_N: Floats) -> float:
        """Fixed point of: residuals squared over observations minus the effective number of parameters."""
        noise = self._guess
        weights, vectors = np.linalg.eigh(signal_NN)
        weights, projected = np.clip(weights, 0.0, None), (vectors.T @ values_N) ** 2
        for _ in range(MAX_NOISE_ROUNDS):
            shrink = noise / (weights + noise)
            before = noise
            left_over = (shrink**2 * projected).sum()
            noise = (PRIOR_OBSERVATIONS * self._guess + left_over) / (PRIOR_OBSERVATIONS + shrink.sum())
            if abs(noise - before) <= NOISE_TOLERANCE * before:
                break
        return float(noise)
