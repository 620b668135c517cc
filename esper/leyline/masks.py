"""Which actions a state allows: structure alone, from columns that every row stores.

Masked here: stage, free slot, `max_seeds`, `max_fossils`, parameter budget, dwell not reached, alpha not full.
Measured gates (G2, G5) never mask: they refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import (
    DWELL_EPOCHS,
    LEVER_SIZES,
    MAX_SLOTS,
    TREE_WIDTH,
    Bools,
    Op,
    lever_slice,
    slot_slice,
)
from esper.leyline.observations import Columns, slot_column
from esper.leyline.stages import LIVE_STAGES, OCCUPIED_STAGES, Stage


@dataclass(frozen=True, slots=True)
class LeverRules:
    """What an environment offers at GERMINATE.

    Attributes:
        blueprint_params_SB: Parameters of each blueprint in each slot, int64 [S, 8].
        lever_masks: Per lever the values that the environment allows, bool [size] each; the first is the blueprint.
    """

    blueprint_params_SB: NDArray[np.int64]
    lever_masks: tuple[Bools, ...]


def build_mask(columns: Columns, rules: LeverRules) -> Bools:
    """Return the action mask of each row, bool [N, TREE_WIDTH].

    Args:
        columns: Feature columns, float [N] each; reads stages, epochs in stage, dwell, counts, caps and the budget.
        rules: The environment's levers.
    """
    num = len(columns["num_slots"])
    mask = np.zeros((num, TREE_WIDTH), dtype=bool)
    mask[:, Op.WAIT] = True
    stages = np.stack([columns[slot_column(s, "stage")] for s in range(MAX_SLOTS)], axis=1)
    present = np.arange(MAX_SLOTS) < columns["num_slots"][:, None]
    occupied = (np.isin(stages, [int(s) for s in OCCUPIED_STAGES]) & present).sum(axis=1)
    fossils = ((stages == Stage.FOSSILIZED) & present).sum(axis=1)
    room = occupied < columns["max_seeds"]
    budget = np.where(np.isfinite(columns["param_budget"]), columns["param_budget"], np.inf)
    left = budget - columns["seed_params"]
    for slot in range(MAX_SLOTS):
        stage = stages[:, slot]
        here = present[:, slot]
        affordable = (rules.blueprint_params_SB[slot] <= left[:, None]) & rules.lever_masks[0]
        germinate = here & (stage == Stage.DORMANT) & room & affordable.any(axis=1)
        mask[:, slot_slice(Op.GERMINATE)][:, slot] = germinate
        mask[:, lever_slice(slot, 0)] = affordable & germinate[:, None]
        for lever in range(1, len(LEVER_SIZES)):
            mask[:, lever_slice(slot, lever)] = rules.lever_masks[lever] & germinate[:, None]
        index = np.clip(np.nan_to_num(columns[slot_column(slot, "dwell")], nan=0.0), 0, None).astype(int)
        dwelt = columns[slot_column(slot, "epochs_in_stage")] >= np.take(DWELL_EPOCHS, index)
        mask[:, slot_slice(Op.ADVANCE)][:, slot] = here & (stage == Stage.TRAINING) & dwelt
        commit = here & (stage == Stage.HOLDING) & (fossils < columns["max_fossils"])
        mask[:, slot_slice(Op.FOSSILIZE)][:, slot] = commit
        mask[:, slot_slice(Op.PRUNE)][:, slot] = here & np.isin(stage, [int(s) for s in LIVE_STAGES])
    for op in list(Op)[1:]:
        mask[:, op] = mask[:, slot_slice(op)].any(axis=1)
    return mask
