"""What happens in a cohort, as events: epochs, the lives of seeds, gates and rollbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from pydantic import JsonValue

from esper.kasmina.lifecycle import SlotState
from esper.leyline.actions import Op
from esper.leyline.events import EventKind
from esper.leyline.matrix import CohortPlan
from esper.leyline.stages import Stage
from esper.tolaria.cohort import Cohort
from esper.tolaria.episode import Rider
from esper.tolaria.transitions import Applied

Emit = Callable[[EventKind, dict[str, JsonValue]], object]

_ASKED = {
    (Op.GERMINATE, Stage.DORMANT): "G1",
    (Op.ADVANCE, Stage.GERMINATED): "G1",
    (Op.ADVANCE, Stage.TRAINING): "G2",
    (Op.ADVANCE, Stage.BLENDING): "G3",
    (Op.FOSSILIZE, Stage.HOLDING): "G5",
}
"""The gate that an op asks in a stage."""


class CohortTelemetry:
    """Watches a cohort run and emits what has happened after every step.

    Args:
        plan: What runs.
        emit: Where events go.
        first_episode: Number of the plan's first episode, for readers.
    """

    def __init__(self, plan: CohortPlan, emit: Emit, first_episode: int = 1) -> None:
        self._plan = plan
        self._emit = emit
        self._first = first_episode
        self._slots: list[list[SlotState]] = []
        self._counts: list[dict[str, int]] = []
        self._ended: list[bool] = []
        self._started = time.monotonic()

    def __call__(self, cohort: Cohort, applied: Applied | None) -> None:
        """Emit what the last step brought; `applied` is None after the reset."""
        if applied is None:
            self._begin(cohort)
        for rider in cohort.riders:
            if self._ended[rider.index]:
                continue
            if applied is not None:
                self._seeds(cohort, rider, applied)
            self._epoch(cohort, rider, applied)
            self._slots[rider.index] = list(rider.slots)
            self._ended[rider.index] = rider.done
        if cohort.done:  # controls are known at the very end
            for rider in cohort.riders:
                self._end(cohort, rider)

    def _base(self, rider: Rider) -> dict[str, JsonValue]:
        return {"episode": self._first + rider.index}

    def _begin(self, cohort: Cohort) -> None:
        self._slots = [list(rider.slots) for rider in cohort.riders]
        self._counts = [_counts(rider) for rider in cohort.riders]
        self._ended = [False for _ in cohort.riders]
        for rider, planned in zip(cohort.riders, self._plan.episodes, strict=True):
            self._emit(
                EventKind.EPISODE_STARTED,
                {
                    **self._base(rider),
                    "episode_id": self._plan.identity(planned).episode_id,
                    "environment": cohort.spec.name,
                    "environment_id": cohort.spec.spec_id,
                    "replicate": self._plan.replicate,
                    "env_seed": str(cohort.env_seed),
                    "controller": planned.controller.name,
                    "root": rider.root,
                    "from_epoch": cohort.step_index,
                    "horizon_epochs": cohort.spec.horizon,
                    "host_params": cohort.base_params,
                    "slots": list(cohort.spec.slot_names),
                    "data_source": cohort.data.source,
                    "data_digest": cohort.data.digest,
                },
            )

    def _seeds(self, cohort: Cohort, rider: Rider, applied: Applied) -> None:
        row = rider.submitted_rows[-1]
        op, index = Op(row[0]), row[1]
        before = self._slots[rider.index]
        gate = _ASKED.get((op, before[index].stage)) if op is not Op.WAIT else None
        if gate is not None:
            self._gate(cohort, rider, index, gate, applied.refused_by[rider.index])
        for slot, (was, now) in enumerate(zip(before, rider.slots, strict=True)):
            self._slot(cohort, rider, slot, was, now)
        for done in cohort.interventions:
            if rider.index in done.riders:
                self._emit(
                    EventKind.GOVERNOR_ROLLBACK,
                    {
                        **self._base(rider),
                        "epoch": cohort.step_index,
                        "reason": str(done.reason),
                        "restored_epoch": done.restored_epoch,
                        "lr_scale": done.lr_scale,
                        "gave_up": done.restored_epoch is None,
                    },
                )

    def _gate(self, cohort: Cohort, rider: Rider, slot: int, gate: str, refused_by: str | None) -> None:
        failed = (refused_by or "").partition(":")[2]
        self._emit(
            EventKind.SEED_GATE_EVALUATED,
            {
                **self._where(cohort, rider, slot),
                "gate": gate,
                "mode": cohort.spec.gates,
                "passed": refused_by is None,
                "failed_checks": list(failed.split(",")) if failed else [],
            },
        )

    def _where(self, cohort: Cohort, rider: Rider, slot: int) -> dict[str, JsonValue]:
        return {**self._base(rider), "epoch": cohort.step_index, "slot": cohort.spec.slot_names[slot]}

    def _slot(self, cohort: Cohort, rider: Rider, slot: int, was: SlotState, now: SlotState) -> None:
        if was.stage is now.stage:
            return
        counts, where = self._counts[rider.index], self._where(cohort, rider, slot)
        seed = now.seed if now.seed is not None else was.seed
        blueprint = cohort.spec.blueprints[seed.blueprint] if seed is not None else None
        if was.seed is None and now.seed is not None:
            counts["germinated"] += 1
            self._emit(
                EventKind.SEED_GERMINATED,
                {
                    **where,
                    "blueprint": blueprint,
                    "blend": now.blend_kind.value,
                    "tempo_epochs": now.tempo_epochs,
                    "dwell_epochs": now.dwell_epochs,
                    "isolated": now.isolated,
                    "seed_lr_factor": now.seed_lr_factor,
                },
            )
        if (was.stage, now.stage) == (Stage.BLENDING, Stage.HOLDING) and not cohort.spec.ask_at_every_gate:
            self._gate(cohort, rider, slot, "G3", None)
        self._emit(EventKind.SEED_STAGE_CHANGED, {**where, "from": was.stage.name, "to": now.stage.name})
        if now.stage is Stage.FOSSILIZED:
            counts["fossilized"] += 1
            params = rider.lineage.seeds[slot].num_params
            self._emit(EventKind.SEED_FOSSILIZED, {**where, "blueprint": blueprint, "params": params})
        elif now.seed is None and was.seed is not None:
            counts["pruned"] += 1
            self._emit(EventKind.SEED_PRUNED, {**where, "blueprint": blueprint, "stage": was.stage.name})

    def _epoch(self, cohort: Cohort, rider: Rider, applied: Applied | None) -> None:
        metrics, control = rider.lineage.history[-1], cohort.trunk.history[-1]
        control_accuracy = cohort.data.chance if cohort.trunk.diverged else control.val_accuracy
        names = cohort.spec.slot_names
        self._emit(
            EventKind.EPISODE_EPOCH,
            {
                **self._base(rider),
                "epoch": cohort.step_index,
                "learning_rate": cohort.spec.learning_rate_at(max(0, cohort.step_index - 1)) * rider.lineage.lr_scale,
                "train_loss": _number(metrics.train_loss),
                "val_loss": _number(metrics.val_loss),
                "val_accuracy_percent": _number(100.0 * metrics.val_accuracy),
                "control_val_accuracy_percent": _number(100.0 * control_accuracy),
                "gain_points": _number(100.0 * (metrics.val_accuracy - control_accuracy)),
                "op": None if applied is None else _action(cohort, rider.submitted_rows[-1]),
                "executed": None if applied is None else bool(applied.executed_K[rider.index]),
                "refused_by": None if applied is None else applied.refused_by[rider.index],
                "stages": {name: _stage(slot) for name, slot in zip(names, rider.slots, strict=True)},
                "seed_params": rider.seed_params(),
            },
        )

    def _end(self, cohort: Cohort, rider: Rider) -> None:
        outcome, control, counts = rider.outcome, cohort.control_outcome, self._counts[rider.index]
        if outcome is None or control is None:
            raise RuntimeError("the cohort is done and an outcome is missing")
        rolled = "rolled_back" if rider.lineage.num_rollbacks else "completed"
        self._emit(
            EventKind.EPISODE_ENDED,
            {
                **self._base(rider),
                "outcome": "diverged" if rider.diverged else rolled,
                "control_valid": not cohort.trunk.diverged and cohort.trunk.num_rollbacks == 0,
                "num_epochs": rider.num_steps,
                "test_accuracy_percent": 100.0 * outcome.final_test_accuracy,
                "uncommitted_test_accuracy_percent": 100.0 * outcome.uncommitted_test_accuracy,
                "control_test_accuracy_percent": 100.0 * control.final_test_accuracy,
                "test_gain_points": 100.0 * (outcome.final_test_accuracy - control.final_test_accuracy),
                "host_params": cohort.base_params,
                "seed_params": outcome.seed_params,
                **{f"num_{name}": count for name, count in counts.items()},
                "wall_s": time.monotonic() - self._started,
            },
        )


def _counts(rider: Rider) -> dict[str, int]:
    """What has become of a rider's seeds so far: nothing, unless it goes on from a checkpoint."""
    ops = [Op(row[0]) for row in rider.executed_rows]
    born, committed = ops.count(Op.GERMINATE), ops.count(Op.FOSSILIZE)
    present = sum(slot.seed is not None for slot in rider.slots)
    return {"germinated": born, "fossilized": committed, "pruned": born - present}


def _action(cohort: Cohort, row: Sequence[int]) -> str:
    op = Op(row[0])
    if op is Op.WAIT:
        return op.name
    blueprint = f" {cohort.spec.blueprints[row[2]]}" if op is Op.GERMINATE else ""
    return f"{op.name} {cohort.spec.slot_names[row[1]]}{blueprint}"


def _stage(slot: SlotState) -> str:
    return slot.stage.name if slot.seed is None else f"{slot.stage.name} {slot.epochs_in_stage}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
