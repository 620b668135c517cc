"""Standardised inputs: where the blocks of a view lie, and the mean and sd of their columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.views import NUM_GLOBAL_V4, NUM_SLOT_V4, VIEWS

NUM_GLOBAL_V3 = 23
NUM_SLOT_V3 = 31
CLIP = 10.0
SMALLEST_SD = 1e-3
"""A column that varies less than this in the data is centred and not scaled."""
MOMENT_ROWS = 1024
"""Rows of a data set whose moments are taken at once: the sums depend on it, and so do their last bits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of a view lie: global, then slots, then one blueprint index per slot.

    With `has_presence` the first column of a slot block says whether the host has that slot.
    """

    num_global: int
    num_slots: int
    slot_width: int
    num_indices: int
    has_presence: bool = False

    @property
    def num_numbers(self) -> int:
        """Columns that are numbers, not indices."""
        return self.num_global + self.num_slots * self.slot_width


LAYOUTS: dict[str, Layout] = {
    "v1": Layout(VIEWS["v1"].width, 0, 0, 0),
    "v3": Layout(NUM_GLOBAL_V3, 3, NUM_SLOT_V3, 3),
    "v4": Layout(NUM_GLOBAL_V4, MAX_SLOTS, NUM_SLOT_V4, 0, has_presence=True),
    "v4-hidden": Layout(NUM_GLOBAL_V4, MAX_SLOTS, NUM_SLOT_V4, 0, has_presence=True),
}


class Normaliser(nn.Module):
    """(x - mean) / sd, clipped; a slot column has one mean and sd for all slots, and an absent slot is all zero."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layout: Layout, noise: float) -> None:
        super().__init__()
        self.layout = layout
        self.noise = noise
        self.register_buffer("mean", torch.zeros(layout.num_numbers))
        self.register_buffer("scale", torch.ones(layout.num_numbers))

    def fit(self, obs_NV: Tensor) -> None:
        """Set mean and sd from the rows of a data set; absent slots do not count."""
        self.fit_blocks(obs_NV[i : i + MOMENT_ROWS] for i in range(0, len(obs_NV), MOMENT_ROWS))

    def fit_blocks(self, blocks: Iterable[Tensor]) -> None:
        """Set mean and sd as `fit` does, from the rows in blocks of MOMENT_ROWS, the last one as long as it is."""
        layout = self.layout
        shared, present, all_slots = Moments(), Moments(), Moments()
        for obs_NV in blocks:
            shared.add(obs_NV[:, : layout.num_global])
            if not layout.num_slots:
                continue
            slots = obs_NV[:, layout.num_global : layout.num_numbers].reshape(-1, layout.slot_width)
            present.add(slots[slots[:, 0] > 0] if layout.has_presence else slots)
            if not present.num_rows:
                all_slots.add(slots)
        parts = [shared.mean_and_sd()]
        if layout.num_slots:
            parts += [(present if present.num_rows else all_slots).mean_and_sd()] * layout.num_slots
        mean, sd = (torch.cat(each) for each in zip(*parts))
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / sd)

    def forward(self, numbers_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the global block [N, G] and the slot blocks [N, slots, F]."""
        layout = self.layout
        scaled = ((numbers_NV - self.mean) * self.scale).clamp(-CLIP, CLIP)
        if self.training and self.noise > 0:
            scaled = scaled + self.noise * torch.randn_like(scaled)
        shape = (len(numbers_NV), layout.num_slots, layout.slot_width)
        blocks = scaled[:, layout.num_global :].reshape(shape)
        if layout.has_presence:
            raw = numbers_NV[:, layout.num_global :].reshape(shape)
            blocks = blocks * (raw[:, :, :1] > 0)
        return scaled[:, : layout.num_global], blocks


class Moments:
    """Mean and sd of columns from rows that come in blocks (Chan, Golub, LeVeque 1979), in float64."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in more rows; none is fine."""
        if not len(rows):
            return
        wide = rows.double()
        mean = wide.mean(dim=0)
        squares = (wide - mean).square().sum(dim=0)
        if not self.num_rows:
            self.num_rows, self._mean, self._squares = len(rows), mean, squares
            return
        total = self.num_rows + len(rows)
        ahead = mean - self._mean
        self._mean = self._mean + ahead * (len(rows) / total)
        self._squares = self._squares + squares + ahead.square() * (self.num_rows * len(rows) / total)
        self.num_rows = total

    def mean_and_sd(self) -> tuple[Tensor, Tensor]:
        """Return both in float32; the sd of a column that hardly varies is 1."""
        sd = (self._squares / self.num_rows).sqrt()
        return self._mean.float(), torch.where(sd < SMALLEST_SD, torch.ones_like(sd), sd).float()
