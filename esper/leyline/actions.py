"""Actions and the flat layout of the action tree.

An action is `op`, then `slot`, then the six levers that GERMINATE reads. ADVANCE, FOSSILIZE and PRUNE read the slot
alone, WAIT reads nothing. What an op does not read is stored as 0, so an action has exactly one spelling.

Every per-choice quantity (mask, logits, values) is one vector of `TREE_WIDTH` entries:

    [ op: 5 | slot given op, for GERMINATE, ADVANCE, FOSSILIZE, PRUNE: 4 x 6 | levers given slot: 6 x 26 ]

Shape suffixes: N rows, A the 8 columns of an action, T the TREE_WIDTH entries, S slots, L the 26 lever choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from esper.leyline.errors import MaskError, unknown_name


class Op(IntEnum):
    """The operation of a step."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    FOSSILIZE = 3
    PRUNE = 4


class Blend(StrEnum):
    """How alpha rises; the number of a sigmoid is its steepness."""

    LINEAR = "linear"
    SIGMOID_HALF = "sigmoid-0.5"
    SIGMOID = "sigmoid-1"
    SIGMOID_DOUBLE = "sigmoid-2"
    GATED = "gated"


class Isolation(StrEnum):
    """Whether a blended seed's input is detached from the host."""

    ISOLATED = "isolated"
    COADAPT = "coadapt"


CNN_BLUEPRINTS = (
    "norm",
    "attention",
    "conv_small",
    "bottleneck",
    "depthwise",
    "dilated",
    "conv_light",
    "conv_heavy",
)
TRANSFORMER_BLUEPRINTS = (
    "norm",
    "lora",
    "lora_large",
    "attention",
    "mlp_small",
    "mlp",
    "gated_mlp",
    "conv",
)
BLENDS: tuple[Blend, ...] = tuple(Blend)
TEMPO_EPOCHS = (3, 5, 8, 12)
DWELL_EPOCHS = (1, 2, 3, 5)
ISOLATIONS: tuple[Isolation, ...] = tuple(Isolation)
SEED_LR_FACTORS = (0.5, 1.0, 2.0)

NUM_OPS = len(Op)
MAX_SLOTS = 6
LEVERS = ("blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr")
LEVER_SIZES = (8, 5, 4, 4, 2, 3)
NUM_LEVER_CHOICES = sum(LEVER_SIZES)
LEVER_OFFSETS = tuple(int(v) for v in np.cumsum((0, *LEVER_SIZES[:-1])))
ACTION_COLUMNS = ("op", "slot", *LEVERS)
ACTION_WIDTH = len(ACTION_COLUMNS)

SLOT_START = NUM_OPS
LEVER_START = SLOT_START + (NUM_OPS - 1) * MAX_SLOTS
TREE_WIDTH = LEVER_START + MAX_SLOTS * NUM_LEVER_CHOICES

OP_SLICE = slice(0, NUM_OPS)

Bools = NDArray[np.bool_]
Actions = NDArray[np.int8]


def slot_slice(op: int) -> slice:
    """Return the entries of the slot choice under an op other than WAIT."""
    start = SLOT_START + (op - 1) * MAX_SLOTS
    return slice(start, start + MAX_SLOTS)


def lever_slice(slot: int, lever: int) -> slice:
    """Return the entries of one lever of a GERMINATE in a slot."""
    start = LEVER_START + slot * NUM_LEVER_CHOICES + LEVER_OFFSETS[lever]
    return slice(start, start + LEVER_SIZES[lever])


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One action in words; `to_row` gives its eight numbers."""

    op: Op
    slot: int = 0
    blueprint: int = 0
    blend: Blend = Blend.LINEAR
    tempo_epochs: int = TEMPO_EPOCHS[0]
    dwell_epochs: int = DWELL_EPOCHS[0]
    isolation: Isolation = Isolation.COADAPT
    seed_lr_factor: float = 1.0

    def to_row(self) -> Actions:
        """Return the canonical int8 [A] row.

        Raises:
            UnknownNameError: A lever has a value that the tree does not offer.
        """
        row = np.zeros(ACTION_WIDTH, dtype=np.int8)
        row[0] = self.op
        if self.op is Op.WAIT:
            return row
        row[1] = self.slot
        if self.op is not Op.GERMINATE:
            return row
        row[2] = self.blueprint
        row[3] = BLENDS.index(self.blend)
        row[4] = _index_of("tempo", self.tempo_epochs, TEMPO_EPOCHS)
        row[5] = _index_of("dwell", self.dwell_epochs, DWELL_EPOCHS)
        row[6] = ISOLATIONS.index(self.isolation)
        row[7] = _index_of("seed_lr", self.seed_lr_factor, SEED_LR_FACTORS)
        return row


WAIT_ROW: Actions = np.zeros(ACTION_WIDTH, dtype=np.int8)


def _index_of(lever: str, value: float, choices: Sequence[float]) -> int:
    if value not in choices:
        raise unknown_name(f"{lever} value", str(value), [str(choice) for choice in choices])
    return list(choices).index(value)


def action_from_row(row: NDArray[np.integer]) -> Action:
    """Return the action that a canonical row spells."""
    op = Op(int(row[0]))
    if op is not Op.GERMINATE:
        return Action(op=op, slot=int(row[1]))
    return Action(
        op=op,
        slot=int(row[1]),
        blueprint=int(row[2]),
        blend=BLENDS[int(row[3])],
        tempo_epochs=TEMPO_EPOCHS[int(row[4])],
        dwell_epochs=DWELL_EPOCHS[int(row[5])],
        isolation=ISOLATIONS[int(row[6])],
        seed_lr_factor=SEED_LR_FACTORS[int(row[7])],
    )


def canonicalise(actions_NA: NDArray[np.integer]) -> Actions:
    """Return a copy of int [N, A] actions with everything that the op does not read set to 0."""
    out = np.array(actions_NA, dtype=np.int8, copy=True)
    out[out[:, 0] == Op.WAIT, 1:] = 0
    out[out[:, 0] != Op.GERMINATE, 2:] = 0
    return out


def is_canonical(actions_NA: NDArray[np.integer]) -> Bools:
    """Return bool [N]: in range and everything that the op does not read is 0."""
    sizes = np.array((NUM_OPS, MAX_SLOTS, *LEVER_SIZES))
    in_range = ((actions_NA >= 0) & (actions_NA < sizes)).all(axis=1)
    same = (actions_NA == canonicalise(actions_NA)).all(axis=1)
    return np.asarray(in_range & same, dtype=bool)


def entries_of(actions_NA: NDArray[np.integer]) -> tuple[NDArray[np.int64], Bools]:
    """Return the tree entries that each action passes, int64 [N, A], and which of them it reads, bool [N, A].

    Entries that are not read point at 0 and must be ignored.
    """
    act = actions_NA.astype(np.int64)
    op, slot = act[:, 0], act[:, 1]
    entries = np.zeros(act.shape, dtype=np.int64)
    read = np.zeros(act.shape, dtype=bool)
    entries[:, 0] = op
    read[:, 0] = True
    read[:, 1] = op != Op.WAIT
    entries[:, 1] = np.where(read[:, 1], SLOT_START + (op - 1) * MAX_SLOTS + slot, 0)
    germinate = op == Op.GERMINATE
    for lever, offset in enumerate(LEVER_OFFSETS):
        read[:, 2 + lever] = germinate
        entry = LEVER_START + slot * NUM_LEVER_CHOICES + offset + act[:, 2 + lever]
        entries[:, 2 + lever] = np.where(germinate, entry, 0)
    return entries, read


def is_valid(actions_NA: NDArray[np.integer], mask_NT: Bools) -> Bools:
    """Return bool [N]: the action is canonical and every choice on its path is in the mask."""
    canonical = is_canonical(actions_NA)
    safe = np.where(canonical[:, None], actions_NA, 0)
    entries, read = entries_of(safe)
    allowed = np.take_along_axis(mask_NT, entries, axis=1) | ~read
    result: Bools = canonical & allowed.all(axis=1)
    return result


def check_mask(mask_NT: Bools) -> None:
    """Raise MaskError unless every row allows WAIT and every allowed choice leads to a whole action."""
    if mask_NT.ndim != 2 or mask_NT.shape[1] != TREE_WIDTH:
        raise MaskError(f"mask has shape {mask_NT.shape}\n  expected: [N, {TREE_WIDTH}]")
    rows = np.flatnonzero(~mask_NT[:, Op.WAIT])
    if rows.size:
        raise MaskError(f"row {rows[0]} of the mask does not allow WAIT\n  expected: WAIT is always valid")
    for op in list(Op)[1:]:
        slots = mask_NT[:, slot_slice(op)]
        bad = np.flatnonzero(mask_NT[:, op] != slots.any(axis=1))
        if bad.size:
            raise MaskError(
                f"row {bad[0]}: {op.name} is {'valid' if mask_NT[bad[0], op] else 'masked'} "
                f"but its slots are {np.flatnonzero(slots[bad[0]]).tolist()}"
            )
    for slot in range(MAX_SLOTS):
        needed = mask_NT[:, slot_slice(Op.GERMINATE)][:, slot]
        for lever, name in enumerate(LEVERS):
            bad = np.flatnonzero(needed & ~mask_NT[:, lever_slice(slot, lever)].any(axis=1))
            if bad.size:
                raise MaskError(f"row {bad[0]}: GERMINATE in slot {slot} is valid but no value of {name} is")


def is_forced(mask_NT: Bools) -> Bools:
    """Return bool [N]: WAIT is the only valid action."""
    result: Bools = mask_NT[:, OP_SLICE].sum(axis=1) == 1
    return result


def pack_mask(mask_NT: Bools) -> NDArray[np.uint8]:
    """Return the mask as bits, uint8 [N, ceil(T / 8)]."""
    return np.packbits(mask_NT, axis=1)


def unpack_mask(packed: NDArray[np.uint8]) -> Bools:
    """Invert `pack_mask`."""
    return np.unpackbits(packed, axis=1, count=TREE_WIDTH).astype(bool)
