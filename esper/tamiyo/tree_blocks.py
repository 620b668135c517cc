"""How the flat entries of the action tree lie as blocks along whose dimension 1 the alternatives of a choice are.

    op [N, 5] | slot, by op [N, 6, 4] | value of a lever, padded to the widest, by slot and lever [N, 8, 6, 6]

`split` gives the blocks of all entries, a row first; `open_blocks` those of the slots alone that are open in some row
of a batch, the rows last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper.leyline.actions import (
    LEVER_SIZES,
    LEVER_START,
    LEVERS,
    MAX_SLOTS,
    NUM_LEVER_CHOICES,
    NUM_OPS,
    OP_SLICE,
    SLOT_START,
    TREE_WIDTH,
    Op,
    lever_slice,
)
from esper.leyline.errors import MaskError

MASKED = -1e30
"""Stands for minus infinity inside: sums of seven of them stay finite in float32, and their exp is exactly 0."""

_WIDEST = max(LEVER_SIZES)
_GERMINATE = int(Op.GERMINATE) - 1


def _lever_indices() -> tuple[Tensor, Tensor]:
    """Return the flat entry of each place of the lever block (TREE_WIDTH: padding), and the place of each entry."""
    block = torch.full((_WIDEST, MAX_SLOTS, len(LEVERS)), TREE_WIDTH)
    for slot in range(MAX_SLOTS):
        for lever, size in enumerate(LEVER_SIZES):
            part = lever_slice(slot, lever)
            block[:size, slot, lever] = torch.arange(part.start, part.stop)
    flat = block.flatten()
    return flat, flat.argsort()[: MAX_SLOTS * NUM_LEVER_CHOICES]


_PAD, _UNPAD = _lever_indices()
OPS = torch.arange(NUM_OPS)
SLOTS = torch.arange(SLOT_START, LEVER_START).view(NUM_OPS - 1, MAX_SLOTS).t()
LEVER_BLOCK = _PAD.view(_WIDEST, MAX_SLOTS, len(LEVERS))


class Parts(NamedTuple):
    """The three blocks of a flat tensor."""

    op: Tensor
    slot: Tensor
    lever: Tensor


def check_some(mask_NT: Tensor) -> None:
    """Raise MaskError unless every row has TREE_WIDTH entries and allows an op."""
    if mask_NT.ndim != 2 or mask_NT.shape[1] != TREE_WIDTH:
        raise MaskError(f"mask has shape {tuple(mask_NT.shape)}\n  expected: [N, {TREE_WIDTH}]")
    live = mask_NT[:, OP_SLICE].any(dim=1)
    if not bool(live.all()):
        row = int(torch.nonzero(~live)[0])
        raise MaskError(f"row {row} of the mask allows no action\n  expected: WAIT is always valid")


def split(values_NT: Tensor, pad: float) -> Parts:
    """Return the blocks of flat entries; the padding of the levers is `pad`."""
    num = len(values_NT)
    padded = nn.functional.pad(values_NT, (0, 1), value=pad)
    return Parts(
        values_NT[:, OP_SLICE],
        values_NT[:, SLOT_START:LEVER_START].reshape(num, NUM_OPS - 1, MAX_SLOTS).transpose(1, 2),
        padded.index_select(1, _PAD).reshape(num, *LEVER_BLOCK.shape),
    )


def join(parts: Parts) -> Tensor:
    """Return the flat entries of three blocks: the inverse of `split`."""
    lever = parts.lever.flatten(1).index_select(1, _UNPAD)
    return torch.cat([parts.op, parts.slot.transpose(1, 2).flatten(1), lever], dim=1)


class Kept(NamedTuple):
    """The entries of a batch without the slots that are closed in every row.

    Attributes:
        columns: Flat entries of the op, slot and lever blocks, one after the other; padding names the last entry, [K].
        padding: Where in `columns` padding is.
        slots: The slots in which some row may act, and the first one in any case, [S].
        places: Which of those some row may germinate in, [G].
        inverse: Where in `columns` each flat entry is, [TREE_WIDTH]; K where it is not kept.
    """

    columns: Tensor
    padding: NDArray[np.int64]
    slots: Tensor
    places: Tensor
    inverse: Tensor


class Choices(NamedTuple):
    """What a batch of masks allows.

    Attributes:
        open_KN: 1 where an entry that is kept may be taken, 0 elsewhere, float32.
        closed_KN: 0 where it may be taken, MASKED elsewhere, float32. Adding is ten times as fast as filling.
        kept: Which entries are kept.
    """

    open_KN: Tensor
    closed_KN: Tensor
    kept: Kept


class Open(NamedTuple):
    """The blocks of what is kept, MASKED where closed: [5, N], [S, 4, N] and [8, G, 6, N].

    Alternatives lie along the first dimension and rows along the last, so that every reduction adds up long vectors.
    """

    op: Tensor
    slot: Tensor
    lever: Tensor


@lru_cache(maxsize=1024)
def _kept(open_slots: bytes) -> Kept:
    """Return what is kept where some row may take these slot choices, a bool each."""
    by_op = torch.frombuffer(bytearray(open_slots), dtype=torch.bool).view(NUM_OPS - 1, MAX_SLOTS)
    acting = by_op.any(dim=0)
    acting[0] = True  # so that no reduction is over nothing
    slots = torch.nonzero(acting).squeeze(1)
    places = torch.nonzero(by_op[_GERMINATE, slots]).squeeze(1)
    columns = torch.cat([OPS, SLOTS[slots].flatten(), LEVER_BLOCK[:, slots[places]].flatten()])
    padding = np.flatnonzero(columns.numpy() == TREE_WIDTH)
    inverse = torch.full((TREE_WIDTH + 1,), len(columns)).scatter_(0, columns, torch.arange(len(columns)))
    return Kept(columns.clamp(max=TREE_WIDTH - 1), padding, slots, places, inverse[:TREE_WIDTH])


def open_choices(mask_NT: Tensor) -> Choices:
    """Return what a batch of masks allows; MaskError where a row allows nothing."""
    check_some(mask_NT)
    mask = mask_NT.numpy()
    kept = _kept(mask[:, SLOT_START:LEVER_START].any(axis=0).tobytes())
    allowed = mask.T[kept.columns.numpy()].astype(np.float32)
    allowed[kept.padding] = 0.0
    open_KN = torch.from_numpy(allowed)
    return Choices(open_KN, (open_KN - 1) * -MASKED, kept)


def open_blocks(values_NT: Tensor, choices: Choices) -> Open:
    """Return the blocks of what is kept."""
    kept = choices.kept
    values = values_NT.t().index_select(0, kept.columns).clamp(min=MASKED) + choices.closed_KN
    num_rows, first_lever = len(values_NT), NUM_OPS + len(kept.slots) * (NUM_OPS - 1)
    slot = values[NUM_OPS:first_lever].view(len(kept.slots), NUM_OPS - 1, num_rows)
    lever = values[first_lever:].view(_WIDEST, len(kept.places), len(LEVERS), num_rows)
    return Open(values[:NUM_OPS], slot, lever)
