"""The governor: watches every host that runs, and takes one that breaks back to its last good state.

It asks for no permission and no controller can switch it off. A host is given up after MAX_ROLLBACKS rollbacks. The
clock is never rewound: the episode goes on with the current epoch, on restored weights and half the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor

from esper.kasmina import lifecycle
from esper.leyline.identity import extend_host_key
from esper.leyline.stages import LIVE_STAGES
from esper.tolaria.lineage import NAN, EpochMetrics, Lineage
from esper.tolaria.probes import validate
from esper.tolaria.tasks import TaskData
from esper.tolaria.transitions import Flock

SNAPSHOT_EVERY_EPOCHS = 5

MAX_ROLLBACKS = 2
"""A host that breaks a third time is given up: at a quarter of its learning rate it is not the rate alone."""

EXPLODING_CHANCE_LOSSES = 5.0
"""An epoch's mean training loss beyond this multiple of guessing's (the log of the number of classes) has exploded.

Measured on digits-gap: at most 1.02 in ordinary training, up to 2.4 in the first epoch at thirty times its learning
rate, from which it still recovers, and 36 to 10**15 where it does not.
"""

COLLAPSE_FROM_POINTS = 10.0
"""A host can collapse only from at least this far above chance."""

COLLAPSE_TO_POINTS = 2.0
"""Within this of chance, a host that was well above it has collapsed.

Training accuracy is watched: a mean over the whole epoch on batch statistics. A single bad validation is no collapse:
running statistics that lag behind the weights cost ordinary hosts as much for an epoch.
"""

COLLAPSE_STANDARD_ERRORS = 8.0
"""The height in standard errors of an epoch's accuracy at chance: short epochs must not collapse by luck."""


WEAK_SHARE = 0.5
"""A host below this share of its best height above chance is on its way down: no state to return to."""


class Panic(StrEnum):
    """Why the governor stepped in."""

    NON_FINITE = "non_finite"
    EXPLODING_LOSS = "exploding_loss"
    COLLAPSE = "collapse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """What the governor did to one lineage.

    Attributes:
        host_key: The lineage's key before.
        after_key: Its key afterwards; the same where it was given up.
        epoch: The epoch (0-based) after which it broke.
        reason: Why.
        restored_epoch: Epochs run when the restored state was saved; None where it was given up.
        lr_scale: What multiplies its learning rates from now on.
        riders: Episodes that ride it.
        pruned: Live seeds that they lost.
    """

    host_key: str
    after_key: str
    epoch: int
    reason: Panic
    restored_epoch: int | None
    lr_scale: float
    riders: tuple[int, ...]
    pruned: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GoodState:
    """A host and its fossils as they were when their vitals were last found good; live seeds are no part of it.

    It never changes, so copies of a lineage share it.

    Attributes:
        epochs: Epochs run at the time.
        peak_train_accuracy: The best training accuracy that these weights or their predecessors had reached.
        tensors: Weights and buffers by name.
        optimiser: By name of a weight, its entries in the optimiser's state.
    """

    epochs: int
    peak_train_accuracy: float
    tensors: Mapping[str, Tensor]
    optimiser: Mapping[str, Mapping[str, Any]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself."""
        return self


def watched_tensors(lineage: Lineage) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight and buffer of the host and its fossils."""
    yield from _tensors_of("host", lineage.network.host)
    for slot, graft in sorted(lineage.network.grafts.items()):
        if graft.fossil:
            yield from _tensors_of(f"fossil{slot}", graft.module)
            if graft.gate is not None:
                yield from _tensors_of(f"gate{slot}", graft.gate)


def _tensors_of(prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter
    for name, buffer in module.named_buffers():
        yield f"{prefix}.{name}", buffer


@torch.no_grad()
def remember(lineage: Lineage, epochs: int) -> None:
    """Save the lineage's state as its last good one; call it only after its vitals were found good.

    Args:
        lineage: A lineage.
        epochs: Epochs run.
    """
    named = list(watched_tensors(lineage))
    state = lineage.optimiser.state
    lineage.good = GoodState(
        epochs=epochs,
        peak_train_accuracy=lineage.peak_train_accuracy,
        tensors={name: tensor.detach().clone() for name, tensor in named},
        optimiser={name: {k: _kept(v) for k, v in state[t].items()} for name, t in named if t in state},
    )


def remember_where_due(flock: Flock, data: TaskData, known: Set[str], *, at_end_of_epoch: bool = False) -> None:
    """Save the states of new lineages (forks, fossilizations) and, every SNAPSHOT_EVERY_EPOCHS, of all.

    A fork changes no weight, so a new lineage's state is its parent's, and the fossil with it where one was made. A
    doubtful host keeps the older state, which every fork inherits, unless that one lacks a fossil.

    Args:
        flock: The cohort's lineages.
        data: The task.
        known: Keys of the lineages that are not new.
        at_end_of_epoch: Whether the schedule counts too.
    """
    every = at_end_of_epoch and flock.step % SNAPSHOT_EVERY_EPOCHS == 0
    for key, lineage in flock.lineages.items():
        sound = not lineage.diverged and not lineage.non_finite
        if sound and (every or key not in known) and not (_is_doubtful(lineage, data) and _covers_fossils(lineage)):
            remember(lineage, flock.step)


def _is_doubtful(lineage: Lineage, data: TaskData) -> bool:
    """Whether a host that gives no cause for panic is still no state to return to.

    A bad validation is no panic, but may be the first sign of one: the last batch's step shows in no training loss.
    """
    if not lineage.history[-1].val_loss <= EXPLODING_CHANCE_LOSSES * math.log(data.shape.num_classes):
        return True
    height, now = (accuracy - data.chance for accuracy in (lineage.peak_train_accuracy, _last_accuracy(lineage)))
    return 100 * height >= COLLAPSE_FROM_POINTS and now < WEAK_SHARE * height


def _last_accuracy(lineage: Lineage) -> float:
    """The last training accuracy that was measured, 0 where none was: after a rollback that of an earlier epoch."""
    measured = (m.train_accuracy for m in reversed(lineage.history) if not math.isnan(m.train_accuracy))
    return next(measured, 0.0)


def _covers_fossils(lineage: Lineage) -> bool:
    return lineage.good is not None and all(name in lineage.good.tensors for name, _ in watched_tensors(lineage))


def diagnose(lineage: Lineage, data: TaskData) -> Panic | None:
    """Return why a lineage's last epoch is cause for panic, or None."""
    last = lineage.history[-1]
    if lineage.non_finite:
        return Panic.NON_FINITE
    if last.train_loss > EXPLODING_CHANCE_LOSSES * math.log(data.shape.num_classes):
        return Panic.EXPLODING_LOSS
    num_answers = lineage.spec.batches_per_epoch * lineage.spec.batch_size
    standard_error = 100 * math.sqrt(data.chance * (1 - data.chance) / num_answers)
    height = max(COLLAPSE_FROM_POINTS, COLLAPSE_STANDARD_ERRORS * standard_error)
    was_above = 100 * (lineage.peak_train_accuracy - data.chance) >= height
    if was_above and 100 * (last.train_accuracy - data.chance) <= COLLAPSE_TO_POINTS:
        return Panic.COLLAPSE
    return None


def govern(flock: Flock, data: TaskData) -> list[Intervention]:
    """Look at every lineage after its epoch: roll back those that broke, or give them up.

    Either way its riders lose their live seeds. A lineage that is given up has `diverged` set; one that was rolled
    back has another host_key, and its last epoch's metrics are those of the restored weights (training unmeasured).
    """
    done: list[Intervention] = []
    for key, lineage in list(flock.lineages.items()):
        if lineage.diverged:
            continue
        reason = diagnose(lineage, data)
        if reason is None:
            lineage.peak_train_accuracy = max(lineage.peak_train_accuracy, _number(lineage.history[-1].train_accuracy))
            continue
        pruned = _prune_live_seeds(flock, lineage)
        if lineage.good is None or lineage.num_rollbacks >= MAX_ROLLBACKS:
            _give_up(lineage, data)
        else:
            _roll_back(lineage, lineage.good, data)
            lineage.host_key = extend_host_key(key, ("rollback", flock.step))
            if flock.trunk_key == key:
                flock.trunk_key = lineage.host_key
        done.append(_report(flock, lineage, key, reason, pruned))
    flock.lineages = {lineage.host_key: lineage for lineage in flock.lineages.values()}
    return done


def _report(flock: Flock, lineage: Lineage, before: str, reason: Panic, pruned: int) -> Intervention:
    riders = tuple(rider.index for rider in flock.riders if rider.lineage is lineage and not rider.done)
    return Intervention(
        host_key=before,
        after_key=lineage.host_key,
        epoch=flock.step - 1,
        reason=reason,
        restored_epoch=None if lineage.diverged or lineage.good is None else lineage.good.epochs,
        lr_scale=lineage.lr_scale,
        riders=riders,
        pruned=pruned,
    )


def _give_up(lineage: Lineage, data: TaskData) -> None:
    """End a lineage at chance: what its broken network answers is no measurement."""
    lineage.diverged = True
    _replace_last(lineage, EpochMetrics(val_accuracy=data.chance))


def _prune_live_seeds(flock: Flock, lineage: Lineage) -> int:
    pruned = 0
    for rider in flock.riders:
        if rider.lineage is lineage and not rider.done:
            live = [slot.stage in LIVE_STAGES for slot in rider.slots]
            rider.slots = [lifecycle.prune(slot) if lives else slot for slot, lives in zip(rider.slots, live)]
            pruned += sum(live)
    for slot in [slot for slot, graft in lineage.network.grafts.items() if not graft.fossil]:
        lineage.remove(slot)
    lineage.incubations = {}
    return pruned


@torch.no_grad()
def _roll_back(lineage: Lineage, good: GoodState, data: TaskData) -> None:
    """Restore weights, buffers and optimiser state by value, halve the learning rate, validate again."""
    for name, tensor in watched_tensors(lineage):
        tensor.copy_(good.tensors[name])
        lineage.optimiser.state.pop(tensor, None)
        if name in good.optimiser:
            lineage.optimiser.state[tensor] = {key: _kept(value) for key, value in good.optimiser[name].items()}
    lineage.peak_train_accuracy = good.peak_train_accuracy
    lineage.num_rollbacks += 1
    lineage.lr_scale /= 2
    lineage.non_finite = False
    metrics = EpochMetrics()
    validate(lineage, data, metrics)
    _replace_last(lineage, metrics)


def _replace_last(lineage: Lineage, metrics: EpochMetrics) -> None:
    """Put other metrics in the place of the last epoch's; the plateau is counted anew from the whole history."""
    lineage.host_weight_change = lineage.removal_cost_all = NAN
    history, lineage.history, lineage.plateau_epochs = lineage.history[:-1], [], 0
    for earlier in (*history, metrics):
        lineage.record(earlier)


def _kept(value: Any) -> Any:
    """A value of an optimiser's state, apart from the one that goes on changing."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value
