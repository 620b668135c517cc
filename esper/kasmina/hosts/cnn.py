"""The convolutional host: three and five blocks, wide, deep, tiny and impaired. Shape suffixes: B batch, C, H, W."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.hosts.base import MIN_CHANNELS_LAST, BatchNorm, DataShape, Host, SlotPlace
from esper.kasmina.hosts.pooling import max_pool_relu, norm_can_wait, pooled_norm
from esper.leyline.errors import SpecError
from esper.leyline.host_specs import CnnHost


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU, max-pool; a narrowed block zeroes all but its first channels.

    Where the statistics are fixed and no gradient is asked for, the batch norm is folded into the convolution.
    """

    keep: Tensor | None

    def __init__(self, inputs: int, outputs: int, kernel: int, pool: int, kept: int, frozen: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.conv.weight.requires_grad_(not frozen)
        self.norm = BatchNorm(outputs)
        self.pool = pool
        self.few_channels = outputs < MIN_CHANNELS_LAST
        mask = (torch.arange(outputs) < kept).float()[:, None, None] if kept else None
        self.register_buffer("keep", mask)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output."""
        if self.norm.is_fixed and not torch.is_grad_enabled():
            factor_C, shift_C = self.norm.folded()
            out = self._convolve(x_BCHW, self.conv.weight * factor_C[:, None, None, None], shift_C)
            out = max_pool_relu(out, self.pool)
        else:
            out = self._convolve(x_BCHW, self.conv.weight, None)
            if self.pool > 1 and self.norm.updates and norm_can_wait(out, self.norm.weight):
                out = pooled_norm(out, self.norm, self.pool)
            else:
                out = max_pool_relu(self.norm(out), self.pool)
        return out if self.keep is None else out * self.keep

    def _convolve(self, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.few_channels:
            x_BCHW = x_BCHW.contiguous()
        return F.conv2d(x_BCHW, weight, bias, padding=self.conv.padding)


class ConvHost(Host):
    """Blocks, global average pooling, a linear layer."""

    def __init__(self, spec: CnnHost, shape: DataShape) -> None:
        super().__init__()
        blocks: list[ConvBlock] = []
        places: list[SlotPlace] = []
        channels, size = shape.channels, shape.resolution
        narrowed = spec.narrowed or (0,) * spec.num_slots
        frozen = spec.frozen or (False,) * spec.num_slots
        for index, outputs in enumerate(spec.block_channels):
            kernel, pool = spec.kernels[index], spec.pools[index]
            blocks.append(ConvBlock(channels, outputs, kernel, pool, narrowed[index], frozen[index]))
            channels, size = outputs, size // pool
            if size == 0:
                raise SpecError(
                    f"pools {list(spec.pools)} leave nothing of {shape.resolution}x{shape.resolution} images at block "
                    f"{index}\n  pool less, or take larger images"
                )
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
        self.head = nn.Linear(channels, shape.num_classes)
        self.places = tuple(places)
        self.depth = len(blocks) + 1

    def classify(self, h: Tensor) -> Tensor:
        """Return logits, float [B, classes], from the last segment's output, float [B, C, H, W]."""
        out: Tensor = self.head(h.mean(dim=(2, 3)))
        return out
