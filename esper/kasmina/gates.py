"""Gates: what a transition asks for beyond structure. Each returns the names of the checks that passed and failed.

Permissive gates (for learning) ask for structure and finite weights; strict ones add measured thresholds. A measured
check fails where its measure is NaN: what was not measured is not known to be good.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.kasmina.lifecycle import SlotState
from esper.leyline.gate_thresholds import (
    G2_MIN_GRADIENT_RATIO,
    G2_MIN_IMPROVEMENT_POINTS,
    G2_VANISHED_SHARE,
    G3_MIN_ALPHA,
    G5_MIN_REMOVAL_COST_POINTS,
)
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
    """GERMINATED -> TRAINING: asked by GERMINATE of a free slot, or later by ADVANCE of a seed that waits there.

    Args:
        slot: The slot.
        shape_kept: The blueprint's output has the shape of its input.
        within_budget: All seeds together, this one included, fit the parameter budget.
    """
    ready = slot.stage in (Stage.DORMANT, Stage.GERMINATED)
    return _report("G1", {"slot_ready": ready, "shape_kept": shape_kept, "within_budget": within_budget})


def gate_g2(
    slot: SlotState,
    *,
    weights_finite: bool,
    strict: bool,
    seed_improvement: float,
    gradient_vanishing: float,
    gradient_ratio: float,
) -> GateReport:
    """TRAINING -> BLENDING.

    Args:
        slot: The slot.
        weights_finite: Every weight of the seed is finite.
        strict: Ask for the measures too.
        seed_improvement: Shadow improvement, points; NaN is unmeasured, here and below.
        gradient_vanishing: Share of the seed's tensors whose gradient vanishes.
        gradient_ratio: The seed's gradient against the host's, each per parameter.
    """
    checks = {
        "training": slot.stage is Stage.TRAINING,
        "dwell_reached": slot.epochs_in_stage >= slot.dwell_epochs,
        "weights_finite": weights_finite,
    }
    if strict:
        checks["seed_improvement"] = seed_improvement >= G2_MIN_IMPROVEMENT_POINTS
        checks["gradient_alive"] = gradient_vanishing < G2_VANISHED_SHARE and gradient_ratio >= G2_MIN_GRADIENT_RATIO
    return _report("G2", checks)


def gate_g3(slot: SlotState, *, alpha: float) -> GateReport:
    """BLENDING -> HOLDING: the same, strict or permissive.

    Args:
        slot: The slot.
        alpha: How much of the seed the host hears now.
    """
    return _report("G3", {"blending": slot.stage is Stage.BLENDING, "alpha_full": alpha >= G3_MIN_ALPHA})


def gate_g5(slot: SlotState, *, strict: bool, removal_cost: float) -> GateReport:
    """HOLDING -> FOSSILIZED.

    Args:
        slot: The slot.
        strict: Ask for the measure too.
        removal_cost: Accuracy now minus accuracy without the seed, points; NaN is unmeasured.
    """
    checks = {"holding": slot.stage is Stage.HOLDING}
    if strict:
        checks["removal_cost"] = removal_cost >= G5_MIN_REMOVAL_COST_POINTS
    return _report("G5", checks)
