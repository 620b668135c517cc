"""A finite list of canonical actions as learners use it: see `esper.leyline.action_list` for what is in it.

A germination that nobody tried cannot be chosen.
Shape suffixes: N rows, L the listed actions, the others as in `esper.leyline.actions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper.leyline.action_list import Ints, listed_actions, place_in_list
from esper.leyline.actions import Actions, Bools
from esper.leyline.errors import SpecError
from esper.simic.batches import Transitions
from esper.tamiyo.flat import valid_actions


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
        return cls(listed_actions(transitions.action_NA))

    def __len__(self) -> int:
        return len(self.actions_LA)

    def index(self, actions_NA: Actions) -> Ints:
        """Return the place of each canonical action in the list, [N]; -1 for one that is not in it."""
        return place_in_list(self.actions_LA, actions_NA)

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
