"""What a transition is worth: n-step returns and generalised advantages over consecutive rows of episodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from esper.simic.batches import Transitions

Floats = NDArray[np.float64]


def n_step(transitions: Transitions, steps: int, gamma: float) -> Transitions:
    """Return transitions that bootstrap up to `steps` decisions later, not beyond the end of the episode.

    reward = sum of gamma**k r_(t+k), discount = gamma**n, or 0 once the episode has terminated. What the behaviour did
    in between is not corrected for: the target is biased towards it, the price of fast credit.

    Args:
        transitions: One-step transitions.
        steps: n, 1 or more.
        gamma: Discount in (0, 1].
    """
    num = len(transitions)
    reward = transitions.reward_N.copy()
    discount = transitions.discount_N * gamma
    following = transitions.next_N.copy()
    episode = transitions.episode_N
    for ahead in range(1, steps):
        rows = np.arange(num - ahead)
        target = rows + ahead
        rows = rows[(episode[rows] == episode[target]) & (following[rows] == transitions.state_N[target])]
        target = rows + ahead
        reward[rows] += discount[rows] * transitions.reward_N[target]
        following[rows] = np.where(discount[rows] > 0, transitions.next_N[target], following[rows])
        discount[rows] *= gamma * transitions.discount_N[target]
    return replace(transitions, reward_N=reward, discount_N=discount, next_N=following)


def returns_to_go(transitions: Transitions, gamma: float) -> Floats:
    """Return what followed each row of one-step transitions, sum over k of gamma**k r_(t+k), [N].

    An episode that was cut off counts as far as it went.
    """
    nothing = np.zeros(len(transitions))
    return generalised_advantages(transitions, nothing, nothing, gamma=gamma, lam=1.0)


def generalised_advantages(
    transitions: Transitions, value_N: Floats, next_value_N: Floats, *, gamma: float, lam: float
) -> Floats:
    """Return GAE advantages of one-step transitions, [N] (Schulman et al. 2016).

        delta_t = r_t + gamma (1 - terminated) V(s_(t+1)) - V(s_t);   A_t = sum over k of (gamma lambda)**k delta_(t+k)

    A truncated episode bootstraps from its last state, a terminated one does not.
    """
    delta = transitions.reward_N + gamma * transitions.discount_N * next_value_N - value_N
    goes_on = np.append(transitions.episode_N[1:] == transitions.episode_N[:-1], False)
    advantage = np.zeros(len(delta))
    running = 0.0
    for row in range(len(delta) - 1, -1, -1):
        running = delta[row] + gamma * lam * running * float(goes_on[row] and transitions.discount_N[row] > 0)
        advantage[row] = running
    return advantage
