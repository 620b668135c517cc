"""Tensors of transitions and keyed sampling of minibatches."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.leyline.actions import Bools
from esper.leyline.errors import SpecError
from esper.leyline.keys import KeyPart, numpy_generator
from esper.simic.batches import Floats, Transitions

Weighting = Literal["none", "return"]


class Batch(NamedTuple):
    """Tensors of some transitions; see `Transitions` for what they are."""

    obs: Tensor
    mask: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor
    next_mask: Tensor
    forced: Tensor
    weight: Tensor


def trajectory_probabilities(transitions: Transitions, temperature: float) -> Floats:
    """Return return-weighted sampling probabilities of rows, [N] (Hong et al., ICLR 2023).

        p(tau) prop. to exp((G - min G) / (max G - min G) / temperature)

    within each environment, spread evenly over a trajectory's rows. Every environment keeps its share of rows.
    """
    probability = np.zeros(len(transitions))
    for environment in range(len(transitions.environments)):
        rows = np.flatnonzero(transitions.environment_N == environment)
        if not rows.size:
            continue
        total = transitions.return_N[rows]
        spread = max(float(np.ptp(total)), 1e-9)
        _, episode, lengths = np.unique(transitions.episode_N[rows], return_inverse=True, return_counts=True)
        weight = np.exp((total - total.max()) / spread / temperature) / lengths[episode]
        probability[rows] = weight / weight.sum() * rows.size / len(transitions)
    return probability


class Replay:
    """Transitions as tensors; `sample` draws rows with replacement from a generator keyed by what it is given."""

    def __init__(
        self,
        transitions: Transitions,
        *,
        key: tuple[KeyPart, ...],
        weighting: Weighting = "none",
        temperature: float = 0.1,
        weight_N: Floats | None = None,
    ) -> None:
        """Args: `weight_N` is carried along as the `weight` of each row (1 unless given)."""
        if not len(transitions):
            raise SpecError("no transition to learn from\n  expected: at least one unforced decision to train on")
        self._data = transitions
        self._generator = numpy_generator("replay", *key)
        self._cumulative: Floats | None = None
        if weighting == "return":
            self._cumulative = np.cumsum(trajectory_probabilities(transitions, temperature))
        self._obs = torch.from_numpy(transitions.obs_MV)
        self._mask = torch.from_numpy(transitions.mask_MT)
        self._state = torch.from_numpy(transitions.state_N)
        self._next = torch.from_numpy(transitions.next_N)
        self._action = torch.from_numpy(transitions.action_NA)
        self._reward = torch.from_numpy(transitions.reward_N).float()
        self._discount = torch.from_numpy(transitions.discount_N).float()
        self._forced = torch.from_numpy(transitions.forced_N)
        weight = np.ones(len(transitions)) if weight_N is None else weight_N
        self._weight = torch.from_numpy(weight).float()

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, index: NDArray[np.integer] | slice = slice(None)) -> Batch:
        """Return the tensors of some rows."""
        state, following = self._state[index], self._next[index]
        return Batch(
            obs=self._obs[state],
            mask=self._mask[state],
            action=self._action[index],
            reward=self._reward[index],
            discount=self._discount[index],
            next_obs=self._obs[following],
            next_mask=self._mask[following],
            forced=self._forced[index],
            weight=self._weight[index],
        )

    def sample(self, size: int) -> Batch:
        """Return `size` rows drawn with replacement."""
        if self._cumulative is None:
            return self.rows(self._generator.integers(len(self), size=size))
        draws = self._generator.random(size) * self._cumulative[-1]
        return self.rows(np.minimum(np.searchsorted(self._cumulative, draws, side="right"), len(self) - 1))


def row_weights(transitions: Transitions, weighting: Weighting, temperature: float) -> Floats:
    """Return weights of mean 1 under which a plain mean over rows is what sampling with `weighting` estimates, [N]."""
    if weighting == "none" or not len(transitions):
        return np.ones(len(transitions))
    return trajectory_probabilities(transitions, temperature) * len(transitions)


def unforced(transitions: Transitions) -> Transitions:
    """Return the decisions at which there was a choice."""
    keep: Bools = ~transitions.forced_N
    return transitions.select(keep)
