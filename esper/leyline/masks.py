"""Which actions a state allows: structure alone, from columns that every row stores.

Masked here: stage, free slot, slots that are not in use, `max_seeds`, `max_fossils`, parameter budget, dwell not
reached, alpha not full. Measured gates (G2, G5) never mask: they refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import (
    BLENDS,
    DWELL_EPOCHS,
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    TEMPO_EPOCHS,
    TREE_WIDTH,
    Blend,
    Bools,
    Op,
    lever_slice,
    slot_slice,
)
from esper.leyline.observations import Columns, slot_column
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import LIVE_STAGES, OCCUPIED_STAGES, Stage

_BLEND = LEVERS.index("blend")
_GATED = BLENDS.index(Blend.GATED)


def _no_gates() -> NDArray[np.int64]:
    return np.zeros(MAX_SLOTS, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LeverRules:
    """What an environment offers, beyond what every row says.

    Attributes:
        blueprint_params_SB: Parameters of each blueprint in each slot, int64 [S, 8].
        lever_masks: Per lever the values that the environment allows, bool [size] each; the first is the blueprint.
        enabled_slots: Slots in which a seed may germinate, bool [S].
        ask_at_every_gate: G1 and G3 wait for an ADVANCE too.
        gate_params_S: Parameters that a gated blend adds in each slot, int64 [S].
    """

    blueprint_params_SB: NDArray[np.int64]
    lever_masks: tuple[Bools, ...]
    enabled_slots: Bools
    ask_at_every_gate: bool
    gate_params_S: NDArray[np.int64] = field(default_factory=_no_gates)

    @classmethod
    def of(
        cls,
        spec: EnvironmentSpec,
        blueprint_params_SB: NDArray[np.int64],
        gate_params_S: NDArray[np.int64] | None = None,
    ) -> LeverRules:
        """Return the rules of an environment, given how large its blueprints and gates are."""
        enabled = np.zeros(MAX_SLOTS, dtype=bool)
        enabled[: spec.host.num_slots] = spec.enabled_slots
        gates = _no_gates() if gate_params_S is None else gate_params_S
        return cls(blueprint_params_SB, spec.lever_masks(), enabled, spec.ask_at_every_gate, gates)


def build_mask(columns: Columns, rules: LeverRules) -> Bools:
    """Return the action mask of each row, bool [N, TREE_WIDTH].

    Args:
        columns: Feature columns, float [N] each; reads stages, epochs in stage, dwell, counts, caps and the budget, and
            tempo where every gate is asked.
        rules: What the environment offers.
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
        free = here & (stage == Stage.DORMANT) & room & rules.enabled_slots[slot]
        _allow_germinate(mask, slot, free, left, rules)
        mask[:, slot_slice(Op.ADVANCE)][:, slot] = here & _may_advance(columns, slot, rules)
        commit = here & (stage == Stage.HOLDING) & (fossils < columns["max_fossils"])
        mask[:, slot_slice(Op.FOSSILIZE)][:, slot] = commit
        mask[:, slot_slice(Op.PRUNE)][:, slot] = here & np.isin(stage, [int(s) for s in LIVE_STAGES])
    for op in list(Op)[1:]:
        mask[:, op] = mask[:, slot_slice(op)].any(axis=1)
    return mask


def _allow_germinate(mask: Bools, slot: int, free_N: Bools, left_N: NDArray[np.floating], rules: LeverRules) -> None:
    """Fill in GERMINATE in one slot, where some blueprint is affordable.

    Heads are masked one by one, so a gated blend is offered where every blueprint on offer can be afforded with its
    gate; where no other blend exists, a blueprint counts with its gate.
    """
    gate = int(rules.gate_params_S[slot])
    blends = rules.lever_masks[_BLEND]
    sizes = rules.blueprint_params_SB[slot] + (0 if np.delete(blends, _GATED).any() else gate)
    affordable = (sizes <= left_N[:, None]) & rules.lever_masks[0]
    germinate = free_N & affordable.any(axis=1)
    mask[:, slot_slice(Op.GERMINATE)][:, slot] = germinate
    mask[:, lever_slice(slot, 0)] = affordable & germinate[:, None]
    for lever in range(1, len(LEVER_SIZES)):
        mask[:, lever_slice(slot, lever)] = rules.lever_masks[lever] & germinate[:, None]
    largest = np.where(affordable, rules.blueprint_params_SB[slot], 0).max(axis=1)
    mask[:, lever_slice(slot, _BLEND)][:, _GATED] &= largest + gate <= left_N


def _may_advance(columns: Columns, slot: int, rules: LeverRules) -> Bools:
    """Return in which rows the seed of a slot has been long enough in a stage that an ADVANCE ends, bool [N]."""
    stage, epochs = columns[slot_column(slot, "stage")], columns[slot_column(slot, "epochs_in_stage")]
    able: Bools = (stage == Stage.TRAINING) & (epochs >= _chosen(columns, slot, "dwell", DWELL_EPOCHS))
    if rules.ask_at_every_gate:
        full = (stage == Stage.BLENDING) & (epochs >= _chosen(columns, slot, "tempo", TEMPO_EPOCHS))
        able |= (stage == Stage.GERMINATED) | full
    return able


def _chosen(columns: Columns, slot: int, lever: str, epochs: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the epochs that a lever stands for in each row, the first choice where there is no seed, int64 [N]."""
    index = np.clip(np.nan_to_num(columns[slot_column(slot, lever)], nan=0.0), 0, None).astype(int)
    return np.take(np.array(epochs), index)
