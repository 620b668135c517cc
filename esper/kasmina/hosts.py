"""Hosts: an ordered list of segments with a slot after each, then a head. Shape suffixes: B batch, C, H, W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.leyline.specs import CnnHost


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a third mode: batch statistics that leave the running ones untouched (for probes)."""

    probing = False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised input."""
        if self.probing:
            return F.batch_norm(x_BCHW, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return F.batch_norm(
            x_BCHW,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=0.1,
            eps=self.eps,
        )


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU, max-pool; a narrowed block zeroes all but its first channels."""

    keep: Tensor | None

    def __init__(self, inputs: int, outputs: int, kernel: int, pool: int, kept: int, frozen: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.conv.weight.requires_grad_(not frozen)
        self.norm = BatchNorm(outputs)
        self.pool = pool
        mask = (torch.arange(outputs) < kept).float()[:, None, None] if kept else None
        self.register_buffer("keep", mask)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.norm(self.conv(x_BCHW))
        if self.pool > 1:
            # max and ReLU commute, values and gradients; after pooling ReLU has a quarter of the work
            out = F.max_pool2d(out, self.pool)
        out = torch.relu(out)
        return out if self.keep is None else out * self.keep


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlace:
    """What lies before a slot."""

    channels: int
    resolution: int
    kernel: int
    pool: int
    narrowed: int
    frozen: bool


class Host(nn.Module):
    """Segments and a head; slot i takes the output of segment i."""

    segments: nn.ModuleList

    def __init__(self, spec: CnnHost, in_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        blocks: list[ConvBlock] = []
        places: list[SlotPlace] = []
        channels, size = in_channels, resolution
        narrowed = spec.narrowed or (0,) * spec.num_slots
        frozen = spec.frozen or (False,) * spec.num_slots
        for index, outputs in enumerate(spec.block_channels):
            kernel, pool = spec.kernels[index], spec.pools[index]
            blocks.append(ConvBlock(channels, outputs, kernel, pool, narrowed[index], frozen[index]))
            channels, size = outputs, size // pool
            places.append(
                SlotPlace(
                    channels=channels,
                    resolution=size,
                    kernel=kernel,
                    pool=pool,
                    narrowed=narrowed[index],
                    frozen=frozen[index],
                )
            )
        self.segments = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_classes)
        self.places = tuple(places)
        self.depth = len(blocks) + 1

    def segment(self, index: int, h_BCHW: Tensor) -> Tensor:
        """Return the output of one segment."""
        return cast(Tensor, self.segments[index](h_BCHW))

    def classify(self, h_BCHW: Tensor) -> Tensor:
        """Return logits, float [B, classes], from the last segment's output."""
        out: Tensor = self.head(h_BCHW.mean(dim=(2, 3)))
        return out


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in module.parameters())
