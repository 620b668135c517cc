"""A finite list of canonical actions, for learners that know nothing of a tree.

The whole tree has tens of thousands of leaves; data hold few of them. The list is WAIT, every (ADVANCE, FOSSILIZE or
PRUNE, slot), and the GERMINATE leaves that occur in the data. A germination that nobody tried cannot be chosen.
Shape suffixes: N rows, L the listed actions, the others as in `esper.leyline.actions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, LEVER_SIZES, MAX_SLOTS, NUM_OPS, Actions, Bools, Op
from esper.leyline.errors import SpecError
from esper.simic.batches import Transitions
from esper.tamiyo.flat import valid_actions

Ints = NDArray[np.int64]

_PLACES = (NUM_OPS, MAX_SLOTS, *LEVER_SIZES)


@dataclass(frozen=True, slots=True)
class FlatActions:
    """A list of different canonical actions in increasing order; WAIT, always valid, is the first.

    Attributes:
        actions_LA: The actions, int8.
    """

    actions_LA: Actions

    @classmethod
    def of(cls, transitions: Transitions) -> FlatActions:
        """Return the list for a data set: WAIT, each op on each slot, and the germinations that occur."""
        fixed = [(int(op), slot) for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE) for slot in range(MAX_SLOTS)]
        rows = np.zeros((1 + len(fixed), ACTION_WIDTH), dtype=np.int8)
        rows[1:, :2] = fixed
        seen = transitions.action_NA[transitions.action_NA[:, 0] == Op.GERMINATE]
        return cls(np.unique(np.concatenate([rows, seen]), axis=0))

    def __len__(self) -> int:
        return len(self.actions_LA)

    def index(self, actions_NA: Actions) -> Ints:
        """Return the place of each canonical action in the list, [N]; -1 for one that is not in it."""
        listed, wanted = _codes(self.actions_LA), _codes(actions_NA)
        place = np.minimum(np.searchsorted(listed, wanted), len(listed) - 1)
        result: Ints = np.where(listed[place] == wanted, place, -1)
        return result

    def require(self, actions_NA: Actions) -> Ints:
        """Return the place of each canonical action, [N]; SpecError for one that is not in the list."""
        index = self.index(actions_NA)
        missing = np.flatnonzero(index < 0)
        if missing.size:
            raise SpecError(
                f"action {actions_NA[missing[0]].tolist()} of row {missing[0]} is not among the {len(self)} listed\n"
                "  expected: a list made from these transitions"
            )
        return index

    def valid(self, mask_NT: Bools) -> Bools:
        """Return which actions each row's tree mask allows, bool [N, L]."""
        return valid_actions(self.actions_LA, mask_NT)


def _codes(actions: Actions) -> Ints:
    """One number per action, increasing with the action's lexicographic order."""
    codes: Ints = np.ravel_multi_index(tuple(actions.T.astype(np.int64)), _PLACES).astype(np.int64)
    return codes
