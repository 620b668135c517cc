"""Gates: what a transition asks for beyond structure. Each returns the names of the checks that passed and failed.

Permissive gates (for learning) drop the measured thresholds; strict ones are a later setting of the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.kasmina.lifecycle import SlotState
from esper.leyline.stages import Stage


@dataclass(frozen=True, slots=True)
class GateReport:
    """Which checks of a gate passed and which failed."""

    gate: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def is_open(self) -> bool:
        """Whether every check passed."""
        return not self.failed


def _report(gate: str, checks: dict[str, bool]) -> GateReport:
    passed = tuple(name for name, good in checks.items() if good)
    return GateReport(gate, passed, tuple(name for name, good in checks.items() if not good))


def gate_g1(slot: SlotState, *, shape_kept: bool, within_budget: bool) -> GateReport:
    """GERMINATED -> TRAINING: the seed keeps shape and fits the budget."""
    free = slot.stage is Stage.DORMANT
    return _report("G1", {"slot_free": free, "shape_kept": shape_kept, "within_budget": within_budget})


def gate_g2(slot: SlotState, *, weights_finite: bool) -> GateReport:
    """TRAINING -> BLENDING: the chosen dwell is over and the seed is finite."""
    return _report("G2", {"dwell_reached": slot.epochs_in_stage >= slot.dwell_epochs, "weights_finite": weights_finite})


def gate_g5(slot: SlotState) -> GateReport:
    """HOLDING -> FOSSILIZED: alpha is full."""
    return _report("G5", {"holding": slot.stage is Stage.HOLDING})
