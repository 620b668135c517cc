"""What all learners share: the fields of a recipe, one gradient step, one loop, and what a training run gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from esper.leyline.action_list import listed_actions
from esper.leyline.errors import EsperError
from esper.leyline.spec_base import Spec
from esper.simic.batches import Ints, Transitions
from esper.simic.replay import CHUNK_ROWS, Batch, Replay, Weighting
from esper.simic.resume import Notes, Progress, Stateful, TorchRandom
from esper.tamiyo.kinds import AnyNetwork
from esper.tamiyo.leaves import leaves_of
from esper.tamiyo.networks import NetworkSpec, TreeNet
from esper.tamiyo.normaliser import MOMENT_ROWS

OnLog = Callable[[dict[str, float]], None]
"""Receives numbers by name while training goes on; `step` (or `update`) is among them."""


class TrainingError(EsperError):
    """Training cannot go on: a loss is not finite, or what it relies on does not hold."""


class LearnerSpec(Spec):
    """The fields that every offline recipe has.

    Attributes:
        network: View, size, trunk and form of the networks.
        steps: Gradient steps.
        batch_size: Rows drawn with replacement per step; with a recurrent trunk whole episodes of about as many rows.
        learning_rate: Adam's at the start; it falls to 0 along a half cosine over all steps.
        gradient_clip: Largest norm of all gradients together.
        weighting: `return` draws trajectories prop. to exp(scaled return / weighting_temperature), see `replay`.
        log_every: Steps between two measurements.
        patience: Early stopping: a loop ends once this many measurements in a row have not lowered its held-out loss,
            and goes back to the weights that had the lowest. Which loss decides is said by each recipe. None: every
            step is taken. Without held-out rows nothing can be measured and every step is taken.
    """

    network: NetworkSpec = NetworkSpec()
    steps: Annotated[int, Field(ge=1)] = 1500
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    gradient_clip: Annotated[float, Field(gt=0)] = 10.0
    weighting: Weighting = "none"
    weighting_temperature: Annotated[float, Field(gt=0)] = 0.1
    log_every: Annotated[int, Field(ge=1)] = 100
    patience: Annotated[int, Field(ge=1)] | None = None

    chooses_by_value: ClassVar[bool] = False
    """Whether the policy is the best action of a Q network, which may then choose from a list."""

    @model_validator(mode="after")
    def _a_list_is_chosen_from(self) -> Self:
        if self.network.form == "listed" and not self.chooses_by_value:
            raise ValueError('network.form "listed" is for learners that choose by value: cql')
        return self


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained policy network (its `spec` says what it is) and the last numbers measured on the way."""

    network: AnyNetwork
    metrics: dict[str, float]


def flattened(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """Move parameters and their gradients into one tensor, of which they are parts from then on: one kernel for all."""
    parts = list(parameters)
    flat = nn.Parameter(torch.cat([part.detach().flatten() for part in parts]))
    flat.grad = torch.zeros_like(flat)
    sizes = [part.numel() for part in parts]
    for part, weights, gradient in zip(parts, torch.split(flat.detach(), sizes), torch.split(flat.grad, sizes)):
        part.data = weights.view_as(part)
        part.grad = gradient.view_as(part)
    return flat


class Stepper:
    """Adam with a half-cosine decay and a clipped gradient; refuses a loss that is not finite."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, clip: float, steps: int | None = None
    ) -> None:
        """`steps` is the length of the decay; None keeps the rate."""
        self.base_rate = learning_rate
        self._clip = clip
        self._steps = steps
        self._done = 0
        self._weights = flattened(parameters)
        self._adam = torch.optim.Adam([self._weights], lr=learning_rate, eps=1e-5, fused=True)

    def step(self, loss: Tensor, name: str) -> None:
        """Take one step down the gradient; TrainingError where the loss is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of {name} is {value} at step {self._done}\n"
                "  expected: a finite number; lower the learning rate, or check the data set's features and rewards"
            )
        if self._steps is not None:
            rate = self.base_rate * 0.5 * (1 + math.cos(math.pi * min(self._done / self._steps, 1.0)))
            self._adam.param_groups[0]["lr"] = rate
        gradient = cast(Tensor, self._weights.grad)
        gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = gradient.norm().item()
        if not norm <= self._clip:
            gradient.mul_(self._clip / (norm + 1e-6))
        self._adam.step()
        self._done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the number of steps taken."""
        return {"adam": self._adam.state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take on another stepper's state, of the same parameters."""
        self._adam.load_state_dict(state_dict["adam"])
        self._done = state_dict["done"]


class Follower:
    """Moves a slow copy of a network towards it: slow += rate * (network - slow) (Polyak averaging)."""

    def __init__(self, slow: nn.Module, network: nn.Module, rate: float) -> None:
        self._slow: list[Tensor] = list(slow.parameters())
        self._fast: list[Tensor] = list(network.parameters())
        self._rate = rate

    def step(self) -> None:
        """Move all parameters once."""
        with torch.no_grad():
            torch._foreach_lerp_(self._slow, self._fast, self._rate)


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Return a function of the rows of two tensors, without gradients, computed CHUNK_ROWS at a time."""
    with torch.no_grad():
        starts = range(0, len(first), CHUNK_ROWS)
        return torch.cat([function(first[i : i + CHUNK_ROWS], second[i : i + CHUNK_ROWS]) for i in starts])


def new_tree_net(spec: NetworkSpec, train: Transitions) -> TreeNet:
    """Return a network whose inputs are standardised on the training rows, and which lists the actions that it needs.

    An atomic one lists all that their masks allow, a listed one those that are in them.

    Raises:
        SpecError: Too many actions for an atomic network.
    """
    actions_LA = None
    if spec.form == "atomic":
        union = [block.any(axis=0, keepdims=True) for block in _of_rows(train.mask_MT, train.state_N)]
        actions_LA = leaves_of(np.concatenate(union))
    elif spec.form == "listed":
        actions_LA = listed_actions(train.action_NA)
    if actions_LA is not None:
        spec = spec.model_copy(update={"num_leaves": len(actions_LA)})
    network = TreeNet(spec)
    if network.leaves is not None and actions_LA is not None:
        network.leaves.fill(actions_LA)
    network.encoder.normaliser.fit_blocks(torch.from_numpy(block) for block in _of_rows(train.obs_MV, train.state_N))
    return network


def _of_rows(states: NDArray[Any], state_N: Ints) -> Iterator[NDArray[Any]]:
    """Yield the states of rows, some rows at a time: all of them may be more than memory holds."""
    for start in range(0, len(state_N), MOMENT_ROWS):
        yield states[state_N[start : start + MOMENT_ROWS]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One loop of gradient steps.

    Attributes:
        phase: Its name in stored progress.
        recipe: `log_every` and `patience`.
        steps: Gradient steps.
        counter: The name of the step in what is logged.
        chosen: The name of the chosen step in the metrics.
        keep_best: Go back to the weights of the lowest held-out loss even without patience.
    """

    phase: str
    recipe: LearnerSpec
    steps: int
    counter: str = "step"
    chosen: str = "chosen_step"
    keep_best: bool = False

    def run(
        self,
        network: nn.Module,
        update: Callable[[], dict[str, float]],
        measure: Callable[[], tuple[dict[str, float], float]] | None,
        parts: Mapping[str, Stateful],
        *,
        on_log: OnLog,
        progress: Progress | None,
    ) -> dict[str, float]:
        """Take the steps and return the last numbers, held-out ones at the step that was kept.

        Args:
            network: What is trained; left as it was at the step that was kept.
            update: Takes one gradient step and returns its losses by name.
            measure: Returns the held-out numbers and the loss that decides; None where nothing is held out.
            parts: What else the following steps depend on, by name.
            on_log: Receives the mean losses since the last measurement.
            progress: Where a killed run left off; None stores nothing.

        Raises:
            TrainingError: The held-out loss was never finite.
        """
        choose = measure is not None and (self.keep_best or self.recipe.patience is not None)
        notes = Notes(sums={}, metrics={}, held={}, best=math.inf, best_step=0, best_state={}, waited=0)
        stored: dict[str, Stateful] = {"network": network, **parts, "random": TorchRandom(), "notes": notes}
        first = 0 if progress is None else progress.restore(self.phase, stored)
        for step in range(first + 1, self.steps + 1):
            if self._waited_enough(notes):
                break
            for name, value in update().items():
                notes["sums"][name] = notes["sums"].get(name, 0.0) + value
            if step % self.recipe.log_every == 0 or step == self.steps:
                self._note(notes, step, network, measure)
                on_log(dict(notes["metrics"]))
            if progress is not None:
                last = step == self.steps or self._waited_enough(notes)
                progress.save(self.phase, step, stored, last=last)
        metrics: dict[str, float] = notes["metrics"]
        if not choose:
            return metrics
        if not notes["best_state"]:
            raise TrainingError("the held-out loss was never finite\n  check the features and masks of the data set")
        network.load_state_dict(notes["best_state"])
        held: dict[str, float] = notes["held"]
        return metrics | held | {self.chosen: float(notes["best_step"])}

    def _waited_enough(self, notes: Notes) -> bool:
        patience = self.recipe.patience
        return patience is not None and notes["waited"] >= patience

    def _note(
        self,
        notes: Notes,
        step: int,
        network: nn.Module,
        measure: Callable[[], tuple[dict[str, float], float]] | None,
    ) -> None:
        """Measure, and remember the weights where they are the best so far."""
        since = (step - 1) % self.recipe.log_every + 1
        losses = {name: total / since for name, total in notes["sums"].items()}
        notes["sums"] = {}
        notes["metrics"] = {self.counter: float(step), **losses}
        if measure is None:
            return
        network.eval()
        with torch.no_grad():
            held, loss = measure()
        network.train()
        notes["metrics"] |= held
        if loss < notes["best"]:
            state = {name: value.clone() for name, value in network.state_dict().items()}
            notes.update(best=loss, best_step=step, best_state=state, held=held, waited=0)
        else:
            notes["waited"] += 1


def held_out_mean(replay: Replay, losses: Callable[[Batch], Iterable[Tensor]]) -> list[float]:
    """Return losses that are means over rows, averaged over all rows of a replay."""
    totals: list[float] = []
    for part in replay.chunks():
        values = [float(loss) * len(part.action) for loss in losses(part)]
        totals = [a + b for a, b in zip(totals, values)] if totals else values
    return [total / len(replay) for total in totals]
