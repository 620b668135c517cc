"""What every host is: segments in order, a slot after each, then a head. Shape suffixes: B batch, C, H, W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_CHANNELS_LAST = 8
"""Below so many channels torch's batch norm is several times slower on channels-last activations; above, faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """What a host reads and answers.

    Attributes:
        kind: `image` (float32 [B, channels, resolution, resolution]) or `text` (int64 [B, resolution]).
        channels: Channels of an image; 1 for text.
        resolution: Height and width of an image in pixels; tokens of a row of text.
        num_classes: Classes, or the vocabulary.
    """

    kind: Literal["image", "text"]
    channels: int
    resolution: int
    num_classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlace:
    """What lies before a slot."""

    channels: int
    resolution: int
    kernel: int
    pool: int
    narrowed: int
    frozen: bool


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a third mode: batch statistics that leave the running ones untouched (for probes)."""

    probing = False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised input."""
        if self.probing:
            # as F.batch_norm does it, but a last chunk of one row is no error where images have shrunk to one pixel
            cudnn = torch.backends.cudnn.enabled
            return torch.batch_norm(x_BCHW, self.weight, self.bias, None, None, True, 0.1, self.eps, cudnn)
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

    @property
    def updates(self) -> bool:
        """Whether it normalises with the batch's statistics and updates the running ones."""
        return self.training and not self.probing

    @property
    def is_fixed(self) -> bool:
        """Whether it normalises with the running statistics: one factor and one shift per channel."""
        return not (self.training or self.probing)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return factor and shift per channel that the running statistics come to, float [C] each."""
        factor_C = self.weight * torch.rsqrt(cast(Tensor, self.running_var) + self.eps)
        return factor_C, self.bias - cast(Tensor, self.running_mean) * factor_C


class KeyedDropout(nn.Module):
    """Dropout whose draws come from a generator of its own; without one it lets everything through."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its entries zeroed and the others scaled by 1 / (1 - p)."""
        if self.generator is None or self.p == 0:
            return x
        kept = torch.rand(x.shape, generator=self.generator).to(x.device) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))


class Host(nn.Module):
    """Segments and a head; slot i takes the output of segment i. A subclass fills in the attributes.

    Attributes:
        segments: One module per slot.
        places: What lies before each slot.
        depth: Layers with weights, the head included; a transformer's block counts as one.
    """

    segments: nn.ModuleList
    places: tuple[SlotPlace, ...]
    depth: int

    def segment(self, index: int, h: Tensor) -> Tensor:
        """Return the output of one segment; the first one takes the batch."""
        return cast(Tensor, self.segments[index](h))

    def classify(self, h: Tensor) -> Tensor:
        """Return logits, float [B, classes] or [B, tokens, classes], from the last segment's output."""
        raise NotImplementedError

    def set_dropout(self, generator: torch.Generator | None) -> None:
        """Let every dropout draw from the generator, in the order of the forward pass; None switches dropout off."""
        for module in self.modules():
            if isinstance(module, KeyedDropout):
                module.generator = generator


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in module.parameters())
