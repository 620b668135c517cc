"""Specifications of environments: task, host, optimiser, clock and options."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from esper.leyline.actions import (
    BLENDS,
    DWELL_EPOCHS,
    ISOLATIONS,
    MAX_SLOTS,
    SEED_LR_FACTORS,
    TEMPO_EPOCHS,
    Blend,
    Bools,
    Isolation,
)
from esper.leyline.spec_base import Spec

Positive = Annotated[int, Field(gt=0)]


class DigitsTask(Spec):
    """scikit-learn's 8x8 digits, plain (canvas 8) or placed at random on a larger noisy canvas.

    The source images are split into train, validation and test before any copy is made.
    """

    kind: Literal["digits"] = "digits"
    canvas: Annotated[int, Field(ge=8, le=32)] = 8
    noise_sd: Annotated[float, Field(ge=0)] = 0.0
    sources: tuple[Positive, Positive, Positive] = (1000, 297, 500)
    copies: tuple[Positive, Positive, Positive] = (1, 1, 1)

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        if sum(self.sources) > 1797:
            raise ValueError(f"sources add up to {sum(self.sources)}; the data set has 1797 images")
        if self.canvas == 8 and self.noise_sd == 0 and self.copies != (1, 1, 1):
            raise ValueError("copies of plain digits are identical; use a larger canvas or noise")
        return self

    @property
    def task_id(self) -> str:
        """The id from which environment seeds derive."""
        return f"digits-{self.spec_id}"


TaskSpec = DigitsTask
"""The union of task kinds (one so far)."""


class CnnHost(Spec):
    """Convolution, batch norm, ReLU and max-pool blocks, then global average pooling and a linear layer.

    A slot lies after every block. `narrowed[j]` keeps that many channels of block j (0: all); `frozen[j]` leaves block
    j's convolution at its random start.
    """

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


HostSpec = CnnHost
"""The union of host kinds (one so far)."""


class EnvironmentSpec(Spec):
    """A task, a host, an optimiser, a clock and the options of growth. Its id names an environment's data."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    task: TaskSpec
    host: HostSpec
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive
    batches_per_epoch: Positive
    horizon: Positive
    schedule: Literal["step", "cosine", "constant"] = "step"
    warm_start_epochs: Annotated[int, Field(ge=0)] = 0
    max_seeds: Annotated[int, Field(ge=0, le=MAX_SLOTS)] | None = None
    max_fossils: Annotated[int, Field(ge=0, le=MAX_SLOTS)] | None = None
    param_budget: Positive | None = None
    holding_patience: Positive | None = None
    gates: Literal["permissive"] = "permissive"
    incubation: Literal["own_pass"] = "own_pass"
    seed_gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    default_isolation: Isolation = Isolation.COADAPT
    blends: tuple[Blend, ...] = (Blend.LINEAR, Blend.SIGMOID_HALF, Blend.SIGMOID, Blend.SIGMOID_DOUBLE)
    tempos: tuple[int, ...] = TEMPO_EPOCHS
    dwells: tuple[int, ...] = DWELL_EPOCHS
    isolations: tuple[Isolation, ...] = ISOLATIONS
    seed_lr_factors: tuple[float, ...] = SEED_LR_FACTORS
    numerics: Literal["cpu-fp32"] = "cpu-fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimiser == "adam" and self.momentum != 0.9:
            raise ValueError("momentum has no effect under adam; leave it out")
        if Blend.GATED in self.blends:
            raise ValueError("blend 'gated' is not available yet; choose linear or a sigmoid")
        for name, known in (("tempos", TEMPO_EPOCHS), ("dwells", DWELL_EPOCHS), ("seed_lr_factors", SEED_LR_FACTORS)):
            values = getattr(self, name)
            if not values or not set(values) <= set(known):
                raise ValueError(f"{name} {values} must be a non-empty selection of {known}")
        if not self.blends or not self.isolations:
            raise ValueError("blends and isolations must not be empty")
        if self.default_isolation not in self.isolations:
            raise ValueError(f"default_isolation {self.default_isolation.value!r} is not among {self.isolations}")
        return self

    @property
    def seeds_cap(self) -> int:
        """`max_seeds`, or one per slot."""
        return self.host.num_slots if self.max_seeds is None else self.max_seeds

    @property
    def fossils_cap(self) -> int:
        """`max_fossils`, or one per slot."""
        return self.host.num_slots if self.max_fossils is None else self.max_fossils

    def lever_masks(self) -> tuple[Bools, ...]:
        """Return per lever the values on offer, the blueprint first (all eight)."""
        return (
            np.ones(8, dtype=bool),
            np.array([blend in self.blends for blend in BLENDS]),
            np.array([tempo in self.tempos for tempo in TEMPO_EPOCHS]),
            np.array([dwell in self.dwells for dwell in DWELL_EPOCHS]),
            np.array([isolation in self.isolations for isolation in ISOLATIONS]),
            np.array([factor in self.seed_lr_factors for factor in SEED_LR_FACTORS]),
        )

    def learning_rate_at(self, epoch: int, horizon: int | None = None) -> float:
        """Return the host's learning rate in epoch `epoch` (0-based); growth never touches it.

        `step` is a tenth over the last 30 % of the epochs, `cosine` falls to 2 %.
        """
        length = self.horizon if horizon is None else horizon
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            return self.learning_rate * (0.1 if epoch >= round(0.7 * length) else 1.0)
        return self.learning_rate * float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * epoch / length)))
