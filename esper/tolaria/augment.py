"""Batched augmentation of images, keyed by its generator. Shape suffixes: B batch, C channels, H, W."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(inputs_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the square images shifted by up to an eighth of their size, and mirrored left to right half of the time.

    What a shift uncovers is zero, the mean colour of standardised images. The generator (on the CPU) draws shifts, then
    mirrorings, for the whole batch at once. The result is channels last.
    """
    batch, channels, size, _ = inputs_BCHW.shape
    margin = size // 8
    padded_size = size + 2 * margin
    device = inputs_BCHW.device
    down, right = torch.randint(0, 2 * margin + 1, (2, batch), generator=generator).to(device)
    mirrored = torch.randint(0, 2, (batch,), generator=generator).to(device).bool()
    steps = torch.arange(size, device=device)
    rows_BH = steps + down[:, None] + padded_size * torch.arange(batch, device=device)[:, None]
    columns_BW = torch.where(mirrored[:, None], steps.flip(0), steps) + right[:, None]
    # one gather of whole pixels from the padded batch, laid out as rows of pixels: faster than slicing per image
    pixels = F.pad(inputs_BCHW, (margin,) * 4).permute(0, 2, 3, 1).reshape(-1, channels)
    chosen = (padded_size * rows_BH[:, :, None] + columns_BW[:, None, :]).reshape(-1)
    return pixels.index_select(0, chosen).view(batch, size, size, channels).permute(0, 3, 1, 2)
