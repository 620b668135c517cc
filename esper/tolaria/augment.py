"""Batched augmentation of images, keyed by its generator. Shape suffixes: B batch, C channels, H, W."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(inputs_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the square images shifted by up to an eighth of their size, and mirrored left to right half of the time.

    What a shift uncovers is zero, the mean colour of standardised images.
    """
    batch, _, size, _ = inputs_BCHW.shape
    return shifted(inputs_BCHW, draw_shifts(batch, size, generator).to(inputs_BCHW.device))


def draw_shifts(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw the shifts, then the mirrorings, of a whole batch at once.

    Args:
        batch: Images.
        size: Their height and width, pixels.
        generator: On the CPU, whatever device the images are on.

    Returns:
        Int64 [3, B] on the CPU: pixels down and to the right, each 0 to a quarter of the size, and whether mirrored.
    """
    shifts_2B = torch.randint(0, 2 * (size // 8) + 1, (2, batch), generator=generator)
    mirrored_1B = torch.randint(0, 2, (1, batch), generator=generator)
    return torch.cat([shifts_2B, mirrored_1B])


def shifted(inputs_BCHW: Tensor, draws_3B: Tensor) -> Tensor:
    """Return the images shifted and mirrored as `draw_shifts` says; both on one device.

    Channels last, but for images of one channel, which are laid out as the tasks lay them out.
    """
    batch, channels, size, _ = inputs_BCHW.shape
    margin = size // 8
    padded_size = size + 2 * margin
    device = inputs_BCHW.device
    down, right, mirrored = draws_3B
    steps = torch.arange(size, device=device)
    rows_BH = steps + down[:, None] + padded_size * torch.arange(batch, device=device)[:, None]
    columns_BW = torch.where(mirrored[:, None].bool(), steps.flip(0), steps) + right[:, None]
    # one gather of whole pixels from the padded batch, laid out as rows of pixels: faster than slicing per image
    pixels = F.pad(inputs_BCHW, (margin,) * 4).permute(0, 2, 3, 1).reshape(-1, channels)
    chosen = (padded_size * rows_BH[:, :, None] + columns_BW[:, None, :]).reshape(-1)
    moved = pixels.index_select(0, chosen)
    if channels == 1:
        return moved.view(batch, 1, size, size)
    return moved.view(batch, size, size, channels).permute(0, 3, 1, 2)
