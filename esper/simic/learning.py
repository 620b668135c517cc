"""What all learners share: the fields of a recipe, one gradient step, and what a training run gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from esper.leyline.errors import EsperError
from esper.leyline.spec_base import Spec
from esper.simic.replay import Weighting
from esper.tamiyo.networks import NetworkSpec, TreeNet

OnLog = Callable[[dict[str, float]], None]
"""Receives numbers by name while training goes on; `step` (or `update`) is among them."""

CHUNK_ROWS = 1024


class TrainingError(EsperError):
    """Training cannot go on: a loss is not finite, or what it relies on does not hold."""


class LearnerSpec(Spec):
    """The fields that every offline recipe has.

    Attributes:
        network: View and size of the networks.
        steps: Gradient steps.
        batch_size: Rows drawn with replacement per step.
        learning_rate: Adam's at the start; it falls to 0 along a half cosine.
        gradient_clip: Largest norm of all gradients together.
        weighting: `return` draws trajectories prop. to exp(scaled return / weighting_temperature), see `replay`.
        log_every: Steps between two measurements.
    """

    network: NetworkSpec = NetworkSpec()
    steps: Annotated[int, Field(ge=1)] = 1500
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    gradient_clip: Annotated[float, Field(gt=0)] = 10.0
    weighting: Weighting = "none"
    weighting_temperature: Annotated[float, Field(gt=0)] = 0.1
    log_every: Annotated[int, Field(ge=1)] = 100


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained policy network and the last numbers measured on the way."""

    network: TreeNet
    metrics: dict[str, float]


class Stepper:
    """Adam with a half-cosine decay and a clipped gradient; refuses a loss that is not finite."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, clip: float, steps: int | None = None
    ) -> None:
        """`steps` is the length of the decay; None keeps the rate."""
        self.parameters = list(parameters)
        self.base_rate = learning_rate
        self._clip = clip
        self._steps = steps
        self._done = 0
        self._adam = torch.optim.Adam(self.parameters, lr=learning_rate, eps=1e-5, fused=True)

    def step(self, loss: Tensor, name: str) -> None:
        """Take one step down the gradient; TrainingError where the loss is not finite."""
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss of {name} is {float(loss.detach())} at step {self._done}\n"
                "  expected: a finite number; lower the learning rate, or check the data set's features and rewards"
            )
        if self._steps is not None:
            rate = self.base_rate * 0.5 * (1 + math.cos(math.pi * min(self._done / self._steps, 1.0)))
            self._adam.param_groups[0]["lr"] = rate
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self._adam.step()
        self._done += 1


def track(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move the target's parameters towards the source's: target += rate * (source - target) (Polyak averaging)."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Return a function of the rows of two tensors, without gradients, computed CHUNK_ROWS at a time."""
    with torch.no_grad():
        starts = range(0, len(first), CHUNK_ROWS)
        return torch.cat([function(first[i : i + CHUNK_ROWS], second[i : i + CHUNK_ROWS]) for i in starts])
