"""The imitation policy of the concept documents: its four classes, and what is counted of it.

The classes are the documents' actions WAIT, GERMINATE, ADVANCE and CULL. FOSSILIZE moves a seed on as ADVANCE does and
is of its class; CULL is PRUNE. Shape suffixes: N rows, C the four classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, field_validator

from esper.leyline.actions import NUM_OPS, Actions, Bools, Op
from esper.leyline.comparison import Interval
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.spec_base import Spec


class ActionClass(IntEnum):
    """What the imitation policy chooses among."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    PRUNE = 3


NUM_CLASSES = len(ActionClass)

CLASS_OF_OP: dict[Op, ActionClass] = {
    Op.WAIT: ActionClass.WAIT,
    Op.GERMINATE: ActionClass.GERMINATE,
    Op.ADVANCE: ActionClass.ADVANCE,
    Op.FOSSILIZE: ActionClass.ADVANCE,
    Op.PRUNE: ActionClass.PRUNE,
}

_CLASS_CODES = np.array([CLASS_OF_OP[Op(op)] for op in range(NUM_OPS)], dtype=np.int64)


def classes_of(actions_NA: Actions) -> NDArray[np.int64]:
    """Return the class of each canonical action, int64 [N]."""
    codes: NDArray[np.int64] = _CLASS_CODES[actions_NA[:, 0].astype(np.int64)]
    return codes


def class_mask(mask_NT: Bools) -> Bools:
    """Return the classes of which some op is valid, bool [N, C]."""
    mask = np.zeros((len(mask_NT), NUM_CLASSES), dtype=bool)
    for op, code in CLASS_OF_OP.items():
        mask[:, code] |= mask_NT[:, op]
    return mask


class Confusion(Spec):
    """How often each class was predicted where each was right: `counts[right][predicted]`."""

    counts: tuple[tuple[NonNegativeInt, ...], ...] = ((0,) * NUM_CLASSES,) * NUM_CLASSES

    @field_validator("counts")
    @classmethod
    def _square(cls, counts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if len(counts) != NUM_CLASSES or any(len(row) != NUM_CLASSES for row in counts):
            raise ValueError(f"expected {NUM_CLASSES} rows of {NUM_CLASSES} counts")
        return counts

    @classmethod
    def of(cls, right_N: NDArray[np.integer], predicted_N: NDArray[np.integer]) -> Self:
        """Return the counts of pairs of class codes."""
        flat = np.bincount(right_N * NUM_CLASSES + predicted_N, minlength=NUM_CLASSES**2)
        return cls(counts=tuple(tuple(row) for row in flat.reshape(NUM_CLASSES, NUM_CLASSES).tolist()))

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], prefix: str) -> Self:
        """Invert `metrics`."""
        names = [item.name.lower() for item in ActionClass]
        return cls(counts=tuple(tuple(int(metrics.get(f"{prefix}_{a}_as_{b}", 0)) for b in names) for a in names))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the counts that are not zero, and what follows from them where it is defined, by name."""
        found = {"decisions": float(self.total), "accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy}
        for right in ActionClass:
            for predicted in ActionClass:
                if count := self.counts[right][predicted]:
                    found[f"{right.name.lower()}_as_{predicted.name.lower()}"] = float(count)
        return {f"{prefix}_{name}": value for name, value in found.items() if math.isfinite(value)}

    @property
    def total(self) -> int:
        """Rows counted."""
        return sum(map(sum, self.counts))

    @property
    def num_wrong(self) -> int:
        """Rows whose predicted class is not the right one."""
        return self.total - sum(self.counts[code][code] for code in ActionClass)

    @property
    def accuracy(self) -> float:
        """Share of rows whose class was predicted; NaN without rows."""
        return 1.0 - self.num_wrong / self.total if self.total else math.nan

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that were right somewhere; NaN without rows."""
        recalls = [self.recall(code) for code in ActionClass if any(self.counts[code])]
        return sum(recalls) / len(recalls) if recalls else math.nan

    def num_right(self, code: ActionClass) -> int:
        """Return the rows in which a class was the right one."""
        return sum(self.counts[code])

    def num_predicted(self, code: ActionClass) -> int:
        """Return the rows in which a class was predicted."""
        return sum(row[code] for row in self.counts)

    def recall(self, code: ActionClass) -> float:
        """Return the share of a class's rows that was predicted as it; NaN where it never was right."""
        return self.counts[code][code] / self.num_right(code) if self.num_right(code) else math.nan

    def precision(self, code: ActionClass) -> float:
        """Return the share of a class's predictions that was right; NaN where it never was predicted."""
        return self.counts[code][code] / self.num_predicted(code) if self.num_predicted(code) else math.nan

    def num_wrong_of(self, code: ActionClass) -> int:
        """Return the rows in which a class was right and another one predicted."""
        return self.num_right(code) - self.counts[code][code]


class Agreement(Spec):
    """The heuristic and the imitation policy asked at the same decisions of the same episodes.

    Attributes:
        choices: Classes of the heuristic (right) and the imitation policy (predicted) where there was a choice.
        num_forced: Decisions at which WAIT was the only valid action; they agree there by force.
        num_other_action: Choices of the same class but in another slot, or of another blueprint or lever.
    """

    choices: Confusion
    num_forced: int
    num_other_action: int


class LiveComparison(Spec):
    """The imitation policy beside the heuristic on one environment, paired on selection environment seeds.

    Attributes:
        environment: Its name.
        num_env_seeds: Environment seeds that count.
        num_left_out: Those left out: no valid control, or a failed episode.
        heuristic_test_percent: Test accuracy of the heuristic's networks.
        imitation_test_percent: Test accuracy of the imitation policy's networks.
        test_difference: Imitation minus heuristic, points.
        heuristic_return: Return of the heuristic, units of the reward's scale.
        imitation_return: Return of the imitation policy.
        return_difference: Imitation minus heuristic.
        on_heuristic: Both asked along the heuristic's trajectories.
        on_imitation: Both asked along the imitation policy's own.
    """

    environment: str
    num_env_seeds: int
    num_left_out: int
    heuristic_test_percent: Interval
    imitation_test_percent: Interval
    test_difference: Interval
    heuristic_return: Interval
    imitation_return: Interval
    return_difference: Interval
    on_heuristic: Agreement
    on_imitation: Agreement


class ImitationResult(Spec):
    """An imitation policy, how well it imitates on held-out environment seeds, and how it does live.

    Attributes:
        dataset: `NAME@n` that it learned from.
        policy: Its specification.
        heuristic: Name of the rule beside which it ran.
        choices: Held-out decisions at which there was a choice.
        all_decisions: Held-out decisions, forced ones included, as the published figures count them.
        live: One comparison per environment; empty where none was asked for.
    """

    dataset: str
    policy: LearnedPolicy
    heuristic: str
    choices: Confusion
    all_decisions: Confusion
    live: tuple[LiveComparison, ...] = ()
