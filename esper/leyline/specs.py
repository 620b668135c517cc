"""Specifications of environments: task, host, optimiser, clock and options."""

from __future__ import annotations

import math
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
from esper.leyline.host_specs import BLUEPRINTS, CnnHost, HostSpec, ResNetHost, TransformerHost, slot_names
from esper.leyline.spec_base import Spec
from esper.leyline.task_specs import IMAGE_KINDS, Cifar10Task, DigitsTask, ImagesTask, TaskSpec, TinyStoriesTask

__all__ = [
    "Cifar10Task",
    "CnnHost",
    "DigitsTask",
    "EnvironmentSpec",
    "HostSpec",
    "ImagesTask",
    "ResNetHost",
    "TaskSpec",
    "TinyStoriesTask",
    "TransformerHost",
]

Positive = Annotated[int, Field(gt=0)]

Numerics = Literal["cpu-fp32", "cuda-fp32", "cuda-tf32", "cuda-bf16"]
"""The kind of device and the precision of matrix products and convolutions; CPU float32 alone is bit-reproducible."""


class EnvironmentSpec(Spec):
    """A task, a host, an optimiser, a clock and the options of growth. Its id names an environment's data.

    Attributes:
        schedule: The learning rate's clock, see `learning_rate_at`; `drops` multiplies it at the epochs of `lr_drops`.
        lr_drops: Pairs of an epoch and a factor, for `drops` alone.
        host_frozen_epochs: First epoch and end of a span in which the host's own weights stand still; seeds, fossils
            and the running statistics of its batch norms go on.
        augment: `crop-flip` shifts training images by up to an eighth and mirrors them, keyed by epoch and batch.
        slots: Names of the slots that may be used; left out, all.
        gates: `strict` adds measured thresholds to the gates (see the gates' own page), `permissive` drops them.
        ask_at_every_gate: G1 and G3 wait for an ADVANCE too, instead of opening by themselves.
        incubation: How a seed learns before the host knows it: through its own pass of the suffix, or from the
            gradient that the host computes at the slot.
        default_isolation: Of controllers that do not choose; left out, by topology (CNN isolated, transformer not).
        probe_pairs: Measure the interaction of every pair of live blended seeds each epoch.
        probe_shapley: Measure the Shapley value of every blended seed at the end of an episode (at most four seeds).
        numerics: On which kind of device it runs and how precisely; other numerics are another environment, on the
            same environment seeds.
    """

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
    schedule: Literal["step", "cosine", "constant", "drops"] = "step"
    lr_drops: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]], ...] = ()
    host_frozen_epochs: tuple[Annotated[int, Field(ge=0)], Positive] | None = None
    augment: Literal["none", "crop-flip"] = "none"
    warm_start_epochs: Annotated[int, Field(ge=0)] = 0
    slots: tuple[str, ...] | None = None
    max_seeds: Annotated[int, Field(ge=0, le=MAX_SLOTS)] | None = None
    max_fossils: Annotated[int, Field(ge=0, le=MAX_SLOTS)] | None = None
    param_budget: Positive | None = None
    holding_patience: Positive | None = None
    gates: Literal["permissive", "strict"] = "permissive"
    ask_at_every_gate: bool = False
    incubation: Literal["own_pass", "linearised"] = "own_pass"
    seed_gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    default_isolation: Isolation | None = None
    probe_pairs: bool = False
    probe_shapley: bool = False
    blends: tuple[Blend, ...] = BLENDS
    tempos: tuple[int, ...] = TEMPO_EPOCHS
    dwells: tuple[int, ...] = DWELL_EPOCHS
    isolations: tuple[Isolation, ...] = ISOLATIONS
    seed_lr_factors: tuple[float, ...] = SEED_LR_FACTORS
    numerics: Numerics = "cpu-fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimiser == "adam" and self.momentum != 0.9:
            raise ValueError("momentum has no effect under adam; leave it out")
        for name, known in (("tempos", TEMPO_EPOCHS), ("dwells", DWELL_EPOCHS), ("seed_lr_factors", SEED_LR_FACTORS)):
            values = getattr(self, name)
            if not values or not set(values) <= set(known):
                raise ValueError(f"{name} {values} must be a non-empty selection of {known}")
        if not self.blends or not self.isolations:
            raise ValueError("blends and isolations must not be empty")
        if self.isolation not in self.isolations:
            raise ValueError(f"default_isolation {self.isolation.value!r} is not among {self.isolations}")
        return self

    @model_validator(mode="after")
    def _clock(self) -> Self:
        if (self.schedule == "drops") != bool(self.lr_drops):
            raise ValueError(f"schedule {self.schedule!r} with {len(self.lr_drops)} lr_drops; they belong together")
        if any(later <= earlier for (earlier, _), (later, _) in zip(self.lr_drops, self.lr_drops[1:])):
            raise ValueError(f"the epochs of lr_drops must rise: {self.lr_drops}")
        if self.host_frozen_epochs is not None and self.host_frozen_epochs[0] >= self.host_frozen_epochs[1]:
            raise ValueError(f"host_frozen_epochs {self.host_frozen_epochs}: expected a first epoch and a later end")
        return self

    @model_validator(mode="after")
    def _task_fits_host(self) -> Self:
        is_image = self.task.kind in IMAGE_KINDS
        if is_image != (self.host.topology == "cnn"):
            raise ValueError(f"a {self.host.kind} host cannot learn task {self.task.kind!r}")
        if self.augment != "none" and self.task.kind not in ("cifar10", "images"):
            raise ValueError(f"augment {self.augment!r} is for photographs; task {self.task.kind!r} has none")
        unknown = [name for name in self.slots or () if name not in self.slot_names]
        if self.slots is not None and len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots {list(self.slots)} names one twice")
        if unknown or self.slots == ():
            raise ValueError(f"slots {list(self.slots or ())}: the host has {', '.join(self.slot_names)}")
        return self

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the host's slots."""
        return slot_names(self.host.num_slots)

    @property
    def enabled_slots(self) -> Bools:
        """Which slots may be used, bool [num_slots]."""
        return np.array([self.slots is None or name in self.slots for name in self.slot_names])

    @property
    def blueprints(self) -> tuple[str, ...]:
        """The names of the eight blueprints that the host's topology has."""
        return BLUEPRINTS[self.host.topology]

    @property
    def isolation(self) -> Isolation:
        """The isolation of controllers that do not choose."""
        if self.default_isolation is not None:
            return self.default_isolation
        by_topology = Isolation.ISOLATED if self.host.topology == "cnn" else Isolation.COADAPT
        return by_topology if by_topology in self.isolations else self.isolations[0]

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

        `step` is a tenth over the last 30 % of the epochs, `cosine` falls to 2 %, `drops` multiplies as it says.
        """
        length = self.horizon if horizon is None else horizon
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "drops":
            return self.learning_rate * math.prod(factor for start, factor in self.lr_drops if epoch >= start)
        if self.schedule == "step":
            return self.learning_rate * (0.1 if epoch >= round(0.7 * length) else 1.0)
        return self.learning_rate * float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * epoch / length)))
