"""What a controller is to the engine: a pure function of what it observes, its carry and its keyed draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import Actions, Bools
from esper.leyline.observations import Columns
from esper.leyline.specs import EnvironmentSpec

BLOCK_ROWS = 64
"""Controllers act on blocks of exactly this many rows, padded: a row's result must not depend on its neighbours."""

Carry = dict[str, NDArray[np.generic]]
"""Memory of a controller, arrays with one row per episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeStart:
    """What a controller may know when an episode begins."""

    environment: EnvironmentSpec
    replicate: int
    repetition: int
    epsilon: float
    temperature: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActInputs:
    """One block of rows.

    Attributes:
        columns: Feature columns, float32 [N].
        step_N: Decisions taken so far, int64 [N].
        mask_NT: The action mask, bool [N, TREE_WIDTH].
        uniforms: Keyed draws in [0, 1), float64 [N, 1 + ACTION_WIDTH]: an exploration coin, then one per column.
    """

    columns: Columns
    step_N: NDArray[np.int64]
    mask_NT: Bools
    uniforms: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a controller decided for a block.

    Attributes:
        actions_NA: Canonical valid actions, int8 [N, 8].
        logp_N: Exact joint log-probability of each action, float64 [N]; NaN where it is undefined.
        op_probs: Distribution over ops, float64 [N, 5]; NaN where it is undefined.
        carry: The memory after this step.
        plan_N: Plan index of each row, int64 [N], -1 where there is none.
    """

    actions_NA: Actions
    logp_N: NDArray[np.float64]
    op_probs: NDArray[np.float64]
    carry: Carry
    plan_N: NDArray[np.int64] | None = None


class Controller(Protocol):
    """A decision maker. Pure: equal inputs give equal outputs."""

    name: str

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of episodes that begin now."""
        ...

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one decision per row."""
        ...
