"""Specifications of hosts: the networks that grow. Every host is an ordered list of segments with a slot after each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from esper.leyline.actions import CNN_BLUEPRINTS, MAX_SLOTS, TRANSFORMER_BLUEPRINTS
from esper.leyline.spec_base import Spec

Positive = Annotated[int, Field(gt=0)]
Topology = Literal["cnn", "transformer"]

BLUEPRINTS: dict[Topology, tuple[str, ...]] = {"cnn": CNN_BLUEPRINTS, "transformer": TRANSFORMER_BLUEPRINTS}
"""The eight blueprints of each topology, in the order of the action's codes."""


def slot_names(num_slots: int) -> tuple[str, ...]:
    """Return the names of a host's slots: early, mid and late, and numbered ones between them on deeper hosts."""
    names = [f"slot{index}" for index in range(num_slots)]
    names[num_slots // 2] = "mid"
    names[num_slots - 1] = "late"
    names[0] = "early"
    return tuple(names)


class CnnHost(Spec):
    """Convolution, batch norm, ReLU and max-pool blocks, then global average pooling and a linear layer.

    A slot lies after every block. `narrowed[j]` keeps that many channels of block j (0: all); `frozen[j]` leaves block
    j's convolution at its random start.
    """

    topology: ClassVar[Topology] = "cnn"
    kind: Literal["cnn"] = "cnn"
    channels: tuple[Positive, ...]
    kernels: tuple[Literal[1, 3, 5], ...]
    pools: tuple[Literal[1, 2], ...]
    narrowed: tuple[Annotated[int, Field(ge=0)], ...] = ()
    frozen: tuple[bool, ...] = ()
    width_factor: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        depth = len(self.channels)
        if not 1 <= depth <= MAX_SLOTS:
            raise ValueError(f"{depth} blocks; expected 1 to {MAX_SLOTS}, one slot each")
        for name in ("kernels", "pools"):
            if len(getattr(self, name)) != depth:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {depth} blocks")
        for name in ("narrowed", "frozen"):
            if len(getattr(self, name)) not in (0, depth):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {depth} blocks; expected 0 or all")
        for kept, channels in zip(self.narrowed, self.channels):
            if kept > channels:
                raise ValueError(f"narrowed to {kept} of {channels} channels")
        return self

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each block after the width factor."""
        return tuple(max(1, round(channels * self.width_factor)) for channels in self.channels)

    @property
    def num_slots(self) -> int:
        """One slot after every block."""
        return len(self.channels)


class ResNetHost(Spec):
    """ResNet-18 or -34 with the CIFAR stem: a 3x3 convolution without pooling, then four stages of basic blocks.

    A slot lies after every stage. Source: He et al. 2016.
    """

    topology: ClassVar[Topology] = "cnn"
    kind: Literal["resnet"] = "resnet"
    layers: Literal[18, 34]
    width_factor: Annotated[float, Field(gt=0)] = 1.0

    @property
    def stage_blocks(self) -> tuple[int, int, int, int]:
        """Basic blocks of each stage."""
        return (2, 2, 2, 2) if self.layers == 18 else (3, 4, 6, 3)

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Channels of each stage after the width factor."""
        first, second, third, fourth = (max(1, round(c * self.width_factor)) for c in (64, 128, 256, 512))
        return (first, second, third, fourth)

    @property
    def num_slots(self) -> int:
        """One slot after every stage."""
        return 4


class TransformerHost(Spec):
    """A decoder: learned positions, pre-norm blocks of causal attention and a 4x MLP, output tied to the embedding.

    A slot lies after every `layers / slots` blocks. Source: Radford et al. 2019 (GPT-2).
    """

    topology: ClassVar[Topology] = "transformer"
    kind: Literal["transformer"] = "transformer"
    layers: Positive = 6
    heads: Positive = 6
    embed: Positive = 384
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    slots: Annotated[int, Field(ge=1, le=MAX_SLOTS)] = 3
    width_factor: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.layers % self.slots:
            raise ValueError(f"{self.layers} layers do not divide into {self.slots} slots")
        if self.embed % self.heads:
            raise ValueError(f"embed {self.embed} is not a multiple of {self.heads} heads")
        return self

    @property
    def embed_width(self) -> int:
        """Width of the residual stream after the width factor, a multiple of the heads."""
        return self.heads * max(1, round(self.embed * self.width_factor / self.heads))

    @property
    def num_slots(self) -> int:
        """Slots between groups of layers."""
        return self.slots


HostSpec = Annotated[CnnHost | ResNetHost | TransformerHost, Field(discriminator="kind")]
"""The union of host kinds."""
