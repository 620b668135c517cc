"""How a rule fills a GERMINATE: the free slot, and each lever at the nearest value that the state allows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import (
    ACTION_WIDTH,
    LEVER_OFFSETS,
    LEVER_SIZES,
    LEVER_START,
    MAX_SLOTS,
    NUM_LEVER_CHOICES,
    Actions,
    Bools,
    Op,
    slot_slice,
)

Ints = NDArray[np.int64]

_FAR = 1_000_000


def first_free_slot(mask_NT: Bools, from_slot_N: Ints, num_slots_N: Ints) -> Ints:
    """Return the first slot at or after `from_slot` (round the host) in which GERMINATE is valid, int64 [N].

    Where none is, the result is meaningless: GERMINATE itself is masked there.
    """
    free = mask_NT[:, slot_slice(Op.GERMINATE)]
    distance = (np.arange(MAX_SLOTS) - from_slot_N[:, None]) % np.maximum(num_slots_N, 1)[:, None]
    slot: Ints = np.where(free, distance, _FAR).argmin(axis=1).astype(np.int64)
    return slot


def lever_rows(mask_NT: Bools, slot_N: Ints) -> Bools:
    """Return the lever part of the mask of one slot per row, bool [N, 26]."""
    entries = LEVER_START + slot_N[:, None] * NUM_LEVER_CHOICES + np.arange(NUM_LEVER_CHOICES)
    return np.take_along_axis(mask_NT, entries, axis=1)


def lever_part(levers_NL: Bools, lever: int) -> Bools:
    """Return one lever's columns of `lever_rows`, bool [N, size]."""
    start = LEVER_OFFSETS[lever]
    return levers_NL[:, start : start + LEVER_SIZES[lever]]


def nearest_allowed(allowed: Bools, wanted_N: Ints) -> Ints:
    """Return the allowed index closest to the wanted one, the lower of two equally close, int64 [N]."""
    distance = np.abs(np.arange(allowed.shape[1]) - wanted_N[:, None])
    index: Ints = np.where(allowed, distance, _FAR).argmin(axis=1).astype(np.int64)
    return index


def nth_allowed(allowed: Bools, turn_N: Ints) -> Ints:
    """Return the allowed index whose turn it is, the allowed ones taken in rotation, int64 [N]."""
    count = np.maximum(allowed.sum(axis=1), 1)
    reached = allowed.cumsum(axis=1) == (turn_N % count + 1)[:, None]
    index: Ints = (reached & allowed).argmax(axis=1).astype(np.int64)
    return index


def germinate_rows(slot_N: Ints, lever_values: list[Ints]) -> Actions:
    """Return the GERMINATE rows of slots and lever indices (in tree order), int8 [N, 8]."""
    rows = np.zeros((len(slot_N), ACTION_WIDTH), dtype=np.int8)
    rows[:, 0] = Op.GERMINATE
    rows[:, 1] = slot_N
    for lever, values in enumerate(lever_values):
        rows[:, 2 + lever] = values
    return rows
