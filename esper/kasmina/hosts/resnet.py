"""ResNet-18 and -34 with the CIFAR stem, of torchvision's basic blocks. Shape suffixes: B batch, C, H, W.

Source: He et al. 2016, sections 3.3 and 4.2.
"""

from __future__ import annotations

from torch import Tensor, nn

from esper.kasmina.hosts.base import BatchNorm, DataShape, Host, SlotPlace
from esper.kasmina.torchvision_shim import import_torchvision
from esper.leyline.host_specs import ResNetHost

import_torchvision()

from torchvision.models.resnet import BasicBlock  # noqa: E402 (the shim comes first)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    downsample = None
    if stride > 1 or inputs != outputs:
        downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), BatchNorm(outputs))
    block: nn.Module = BasicBlock(inputs, outputs, stride, downsample, norm_layer=BatchNorm)
    # in place, ReLU would overwrite what a probe or a seed's own pass has tapped
    block.relu = nn.ReLU()
    return block


class ResNet(Host):
    """Stem and four stages, global average pooling, a linear layer; the stem belongs to the first segment."""

    def __init__(self, spec: ResNetHost, shape: DataShape) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        places: list[SlotPlace] = []
        channels, size = spec.stage_channels[0], shape.resolution
        stem = nn.Sequential(_conv(shape.channels, channels, 3, 1), BatchNorm(channels), nn.ReLU())
        for index, (outputs, num_blocks) in enumerate(zip(spec.stage_channels, spec.stage_blocks)):
            stride = 1 if index == 0 else 2
            blocks = [_block(channels, outputs, stride), *(_block(outputs, outputs, 1) for _ in range(num_blocks - 1))]
            stages.append(nn.Sequential(*([stem] if index == 0 else []), *blocks))
            channels, size = outputs, -(-size // stride)
            places.append(
                SlotPlace(channels=channels, resolution=size, kernel=3, pool=stride, narrowed=0, frozen=False)
            )
        self.segments = nn.ModuleList(stages)
        self.head = nn.Linear(channels, shape.num_classes)
        self.places = tuple(places)
        self.depth = spec.layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def classify(self, h: Tensor) -> Tensor:
        """Return logits, float [B, classes], from the last segment's output, float [B, C, H, W]."""
        out: Tensor = self.head(h.mean(dim=(2, 3)))
        return out
