"""A finite list of canonical actions, for formats and learners that know nothing of a tree.

The whole tree has tens of thousands of leaves; data hold few of them. The list is WAIT, every (ADVANCE, FOSSILIZE or
PRUNE, slot), and the GERMINATE leaves that occur in the data. Shape suffixes: N rows, L the listed actions, A as in
`esper.leyline.actions`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import ACTION_WIDTH, LEVER_SIZES, MAX_SLOTS, NUM_OPS, Actions, Op

Ints = NDArray[np.int64]

_PLACES = (NUM_OPS, MAX_SLOTS, *LEVER_SIZES)


def listed_actions(seen_NA: Actions) -> Actions:
    """Return the list for the actions of some data, int8 [L, A]: different ones, in increasing order, WAIT first."""
    fixed = [(int(op), slot) for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE) for slot in range(MAX_SLOTS)]
    rows = np.zeros((1 + len(fixed), ACTION_WIDTH), dtype=np.int8)
    rows[1:, :2] = fixed
    result: Actions = np.unique(np.concatenate([rows, seen_NA[seen_NA[:, 0] == Op.GERMINATE]]), axis=0)
    return result


def place_in_list(actions_LA: Actions, actions_NA: Actions) -> Ints:
    """Return the place of each canonical action in a list in increasing order, [N]; -1 for one that is not in it."""
    listed, wanted = _codes(actions_LA), _codes(actions_NA)
    place = np.minimum(np.searchsorted(listed, wanted), len(listed) - 1)
    result: Ints = np.where(listed[place] == wanted, place, -1)
    return result


def _codes(actions: Actions) -> Ints:
    """One number per action, increasing with the action's lexicographic order."""
    codes: Ints = np.ravel_multi_index(tuple(actions.T.astype(np.int64)), _PLACES).astype(np.int64)
    return codes
