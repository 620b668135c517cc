"""Tensors of transitions and keyed sampling of minibatches; states are read when they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esper.leyline.actions import Bools
from esper.leyline.errors import SpecError
from esper.leyline.keys import KeyPart, numpy_generator
from esper.simic.batches import Floats, Ints, Transitions
from esper.simic.row_files import Index
from esper.tamiyo.networks import History, Inputs

Weighting = Literal["none", "return"]

CHUNK_ROWS = 1024
CHUNK_EPISODES = 64


class Batch:
    """Tensors of some transitions, read when they are first asked for; see `Transitions` for what they are.

    `obs` and `next_obs` are histories where whole episodes were asked for, rows otherwise. `to_go` is 0 unless given.
    """

    def __init__(self, replay: Replay, index: Index, histories: tuple[History, History] | None = None) -> None:
        self._replay = replay
        self._index = index
        self._at = torch.from_numpy(index) if isinstance(index, np.ndarray) else index
        self._histories = histories

    def _states(self, state_N: Ints) -> Tensor:
        return torch.from_numpy(self._replay.data.obs_MV[state_N[self._index]])

    def _rows(self, values: Tensor) -> Tensor:
        at = self._at
        return values.index_select(0, at) if isinstance(at, Tensor) else values[at]

    def _masks(self, state_N: Ints) -> Tensor:
        return torch.from_numpy(self._replay.masks[state_N[self._index]])

    @cached_property
    def obs(self) -> Inputs:
        """What the decision saw."""
        return self._histories[0] if self._histories else self._states(self._replay.data.state_N)

    @cached_property
    def mask(self) -> Tensor:
        """Its action masks."""
        return self._masks(self._replay.data.state_N)

    @cached_property
    def action(self) -> Tensor:
        """Canonical actions."""
        return self._rows(self._replay.action)

    @cached_property
    def reward(self) -> Tensor:
        """Rewards before the bootstrap."""
        return self._rows(self._replay.reward)

    @cached_property
    def discount(self) -> Tensor:
        """Weight of the bootstrap."""
        return self._rows(self._replay.discount)

    @cached_property
    def next_obs(self) -> Inputs:
        """What the state of the bootstrap saw."""
        return self._histories[1] if self._histories else self._states(self._replay.data.next_N)

    @cached_property
    def next_mask(self) -> Tensor:
        """Its action masks."""
        return self._masks(self._replay.data.next_N)

    @cached_property
    def forced(self) -> Tensor:
        """Whether there was no choice."""
        return self._rows(self._replay.forced)

    @cached_property
    def weight(self) -> Tensor:
        """Weights of the rows."""
        return self._rows(self._replay.weight)

    @cached_property
    def to_go(self) -> Tensor:
        """What the episode went on to earn."""
        return self._rows(self._replay.to_go)


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
    """Transitions as tensors; `sample` draws rows with replacement from a generator keyed by what it is given.

    For a recurrent network it draws whole episodes: every row of a batch then comes with all that its episode has
    shown before it.
    """

    def __init__(
        self,
        transitions: Transitions,
        *,
        key: tuple[KeyPart, ...],
        weighting: Weighting = "none",
        temperature: float = 0.1,
        weight_N: Floats | None = None,
        to_go_N: Floats | None = None,
        whole_episodes: bool = False,
    ) -> None:
        """`weight_N` (1 unless given) and `to_go_N` are carried along as `weight` and `to_go` of each row.

        Raises:
            SpecError: No transition, or whole episodes of transitions that do not say what their episodes are.
        """
        if not len(transitions):
            raise SpecError("no transition to learn from\n  expected: at least one unforced decision to train on")
        self.data, self.masks = transitions, transitions.mask_MT
        self._generator = numpy_generator("replay", *key)
        self._episodes = Episodes.of(transitions) if whole_episodes else None
        self._cumulative: Floats | None = None
        if weighting == "return":
            probability = trajectory_probabilities(transitions, temperature)
            if self._episodes is not None:
                probability = probability[self._episodes.first_row_E]
            self._cumulative = np.cumsum(probability)
        self.action = torch.from_numpy(transitions.action_NA)
        self.reward = torch.from_numpy(transitions.reward_N).float()
        self.discount = torch.from_numpy(transitions.discount_N).float()
        self.forced = torch.from_numpy(transitions.forced_N)
        weight = np.ones(len(transitions)) if weight_N is None else weight_N
        self.weight = torch.from_numpy(weight).float()
        self.to_go = torch.from_numpy(np.zeros(len(transitions)) if to_go_N is None else to_go_N).float()

    def __len__(self) -> int:
        return len(self.data)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator: what the next samples depend on."""
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take on the state of the generator."""
        self._generator.bit_generator.state = state_dict["generator"]

    def rows(self, index: Index = slice(None)) -> Batch:
        """Return some rows, without their episodes."""
        return Batch(self, index)

    def _of_episodes(self, chosen_E: Ints) -> Batch:
        """Return all rows of some episodes, in order, with the episodes' histories."""
        if self._episodes is None:
            raise SpecError("this replay holds rows\n  expected: whole_episodes=True")
        index, states, at, following = self._episodes.read(chosen_E)
        shown = torch.from_numpy(self.data.obs_MV[states])
        histories = History(shown, torch.from_numpy(at)), History(shown, torch.from_numpy(following))
        return Batch(self, index, histories)

    def sample(self, size: int) -> Batch:
        """Return `size` rows drawn with replacement; or whole episodes of about as many rows, at least one."""
        if self._episodes is None:
            return self.rows(self._draw(len(self), size))
        wanted = max(1, round(size * len(self._episodes) / len(self)))
        return self._of_episodes(self._draw(len(self._episodes), wanted))

    def _draw(self, num: int, size: int) -> Ints:
        if self._cumulative is None:
            return self._generator.integers(num, size=size)
        draws = self._generator.random(size) * self._cumulative[-1]
        found: Ints = np.minimum(np.searchsorted(self._cumulative, draws, side="right"), num - 1)
        return found

    def chunks(self) -> Iterator[Batch]:
        """Yield all rows in order, CHUNK_ROWS at a time, or CHUNK_EPISODES whole episodes at a time."""
        if self._episodes is None:
            for start in range(0, len(self), CHUNK_ROWS):
                yield self.rows(slice(start, start + CHUNK_ROWS))
            return
        for start in range(0, len(self._episodes), CHUNK_EPISODES):
            yield self._of_episodes(np.arange(start, min(start + CHUNK_EPISODES, len(self._episodes))))


@dataclass(frozen=True, slots=True)
class Episodes:
    """Where the rows and the states of each episode lie.

    Attributes:
        first_row_E: First of its rows.
        num_rows_E: How many rows it has; they are consecutive.
        first_state_E: Its first state.
        num_states_E: How many states it has.
        state_N: State of each row.
        next_N: State from which each row's value is bootstrapped.
    """

    first_row_E: Ints
    num_rows_E: Ints
    first_state_E: Ints
    num_states_E: Ints
    state_N: Ints
    next_N: Ints

    @classmethod
    def of(cls, transitions: Transitions) -> Episodes:
        """Return the episodes that have rows; SpecError where the transitions do not say which states are theirs."""
        if transitions.episode_M is None:
            raise SpecError("these transitions do not say which states belong to an episode\n  expected: `episode_M`")
        names, first_row, num_rows = np.unique(transitions.episode_N, return_index=True, return_counts=True)
        known, first_state, num_states = np.unique(transitions.episode_M, return_index=True, return_counts=True)
        place = np.searchsorted(known, names)
        return cls(first_row, num_rows, first_state[place], num_states[place], transitions.state_N, transitions.next_N)

    def __len__(self) -> int:
        return len(self.first_row_E)

    def read(self, chosen_E: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return what a batch of episodes reads.

        Returns:
            The rows, [N]; the states by episode, padded behind with the last one, [E, T]; and where in those, flat, the
            state of each row and the state after it lie, [N] each.
        """
        steps = np.arange(self.num_states_E[chosen_E].max())
        last = self.num_states_E[chosen_E] - 1
        states = self.first_state_E[chosen_E, None] + np.minimum(steps, last[:, None])
        num_rows = self.num_rows_E[chosen_E]
        which = np.repeat(np.arange(len(chosen_E)), num_rows)
        within = np.arange(len(which)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
        index = self.first_row_E[chosen_E][which] + within
        shift = which * len(steps) - self.first_state_E[chosen_E][which]
        return index, states, self.state_N[index] + shift, self.next_N[index] + shift


def row_weights(transitions: Transitions, weighting: Weighting, temperature: float) -> Floats:
    """Return weights of mean 1 under which a plain mean over rows is what sampling with `weighting` estimates, [N]."""
    if weighting == "none" or not len(transitions):
        return np.ones(len(transitions))
    return trajectory_probabilities(transitions, temperature) * len(transitions)


def unforced(transitions: Transitions) -> Transitions:
    """Return the decisions at which there was a choice."""
    keep: Bools = ~transitions.forced_N
    return transitions.select(keep)
