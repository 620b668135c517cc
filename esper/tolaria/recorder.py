"""From a running cohort to the rows of `steps`, `episodes` and `costs`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import NUM_OPS, Bools, Op, is_forced, pack_mask, slot_slice
from esper.leyline.identity import ENGINE_VERSION, EpisodeIdentity
from esper.leyline.keys import hex_digest
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.rewards import EpisodeColumns, reward_components
from esper.leyline.schema import ACTION_FIELDS, COSTS, EPISODES, STEPS
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import Outcome
from esper.tolaria.step_costs import StepCosts
from esper.tolaria.transitions import Applied

_OP_NAMES = np.array([op.name for op in Op])
_VAL = FEATURE_COLUMNS.index("val_accuracy")
_SEED_PARAMS = FEATURE_COLUMNS.index("seed_params")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What controllers decided for all K episodes: actions, exact log-probabilities, op distributions, plan indices."""

    actions_KA: NDArray[np.int8]
    logp_K: NDArray[np.float64]
    op_probs: NDArray[np.float64]
    plan_K: NDArray[np.int64]


@dataclass(slots=True)
class Moment:
    """All that belongs to one step of the cohort: what was observed, then what was decided and what became of it."""

    observation: Observation
    host_keys: list[str]
    state_ids: list[str]
    control: tuple[float, float]
    costs: StepCosts | None
    decisions: Decisions | None = None
    applied: Applied | None = None

    def of(self, episode: int) -> Moment:
        """Return the moment of one episode alone."""
        keep = slice(episode, episode + 1)
        seen, costs, decisions, applied = self.observation, self.costs, self.decisions, self.applied
        return Moment(
            Observation(step=seen.step, matrix=seen.matrix[keep], mask_KT=seen.mask_KT[keep], done_K=seen.done_K[keep]),
            self.host_keys[keep],
            self.state_ids[keep],
            self.control,
            costs
            and StepCosts(
                cpu_s_alone_K=costs.cpu_s_alone_K[keep],
                cpu_s_shared_K=costs.cpu_s_shared_K[keep],
                riders_K=costs.riders_K[keep],
                flops_K=costs.flops_K[keep],
            ),
            decisions
            and Decisions(
                actions_KA=decisions.actions_KA[keep],
                logp_K=decisions.logp_K[keep],
                op_probs=decisions.op_probs[keep],
                plan_K=decisions.plan_K[keep],
            ),
            applied and Applied(executed_K=applied.executed_K[keep], refused_by=applied.refused_by[keep]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchMark:
    """Where an episode branched off: its parent, the step, how many actions were forced, and who acted before."""

    parent: str
    step: int
    num_forced: int
    parent_actor: str


@dataclass(slots=True)
class Recorder:
    """Collects a cohort's moments; `tables` turns them into Arrow."""

    cohort: Cohort
    plan: CohortPlan
    identities: Sequence[EpisodeIdentity]
    branch: BranchMark | None = None
    moments: list[Moment] = field(default_factory=list)

    def observed(self, observation: Observation) -> None:
        """Note the observation that precedes a decision (or ends the cohort)."""
        cohort = self.cohort
        trunk = cohort.trunk
        metrics = trunk.history[-1]
        accuracy = cohort.data.chance if trunk.diverged else metrics.val_accuracy
        control = (float("nan") if trunk.diverged else metrics.val_loss, accuracy)
        self.moments.append(
            Moment(
                observation,
                [rider.lineage.host_key for rider in cohort.riders],
                [rider.state_id(observation.step) for rider in cohort.riders],
                control,
                cohort.step_costs if observation.step else None,
            )
        )

    def decided(self, decisions: Decisions, applied: Applied) -> None:
        """Note what was decided on the last observation and what became of it."""
        self.moments[-1].decisions = decisions
        self.moments[-1].applied = applied

    def tables(self, code_commit: str) -> dict[str, pa.Table]:
        """Return the three tables, without the commit columns, sorted by (env_seed, episode_id, step)."""
        order = sorted(range(len(self.identities)), key=lambda k: self.identities[k].episode_id)
        steps = _table(_joined([self._steps(self.cohort.riders[k]) for k in order]), STEPS)
        costs = _table(_joined([self._costs(self.cohort.riders[k]) for k in order]), COSTS)
        rows = [self._episode(self.cohort.riders[k], code_commit) for k in order]
        return {"steps": steps, "costs": costs, "episodes": pa.Table.from_pylist(rows, schema=uncommitted(EPISODES))}

    def _ids(self, rider: Rider) -> dict[str, object]:
        return {
            "episode_id": self.identities[rider.index].episode_id,
            "environment": self.plan.environment.name,
            "env_seed": self.plan.env_seed,
        }

    def _steps(self, rider: Rider) -> dict[str, Any]:
        k, length = rider.index, rider.num_steps
        episode = self.plan.episodes[k]
        moments = self.moments[: length + 1]
        features = np.stack([moment.observation.matrix[k] for moment in moments])
        masks = np.stack([moment.observation.mask_KT[k] for moment in moments])
        decided = [moment.decisions for moment in moments[:-1] if moment.decisions is not None]
        applied = [moment.applied for moment in moments[:-1] if moment.applied is not None]
        actions = np.stack([d.actions_KA[k] for d in decided])
        replayed, forced_upon = self._branch_flags(length)
        columns: dict[str, object] = {name: [value] * (length + 1) for name, value in self._ids(rider).items()}
        columns |= {
            "step": np.arange(length + 1),
            "actor": np.where(replayed, self.branch.parent_actor if self.branch else "", episode.controller.name),
            "role": [episode.role.value] * (length + 1),
            "host_key": [moment.host_keys[k] for moment in moments],
            "state_id": [moment.state_ids[k] for moment in moments],
            "is_last": np.arange(length + 1) == length,
            "replayed": replayed,
            "epsilon": [episode.epsilon] * (length + 1),
            "temperature": [episode.temperature] * (length + 1),
            "control_val_loss": [_null(moment.control[0]) for moment in moments],
            "control_val_accuracy": [moment.control[1] for moment in moments],
            "train_flops": [0.0] + [float(m.costs.flops_K[k]) if m.costs else 0.0 for m in moments[1:]],
            "terminated": np.arange(length + 1) == length - 1,
            "truncated": np.zeros(length + 1, dtype=bool),
        }
        columns |= dict(zip(FEATURE_COLUMNS, features.T))
        columns |= _mask_columns(masks)
        columns |= _action_columns(actions)
        columns |= {
            "executed": _padded([bool(a.executed_K[k]) for a in applied]),
            "refused_by": _padded([a.refused_by[k] for a in applied]),
            "plan": _padded([int(d.plan_K[k]) if d.plan_K[k] >= 0 else None for d in decided]),
            "behaviour_logp": _padded([None if f else _null(float(d.logp_K[k])) for d, f in zip(decided, forced_upon)]),
            "op_probs": _padded(
                [None if f or np.isnan(d.op_probs[k]).any() else d.op_probs[k] for d, f in zip(decided, forced_upon)]
            ),
        }
        columns |= self._reward_columns(rider, features)
        return columns

    def _branch_flags(self, length: int) -> tuple[Bools, Bools]:
        """Which rows are a branch's replayed prefix, and which had their action forced."""
        steps = np.arange(length + 1)
        if self.branch is None:
            return steps < 0, steps < 0
        start = self.branch.step
        return steps < start, (steps >= start) & (steps < start + self.branch.num_forced)

    def _reward_columns(self, rider: Rider, features: NDArray[np.float64]) -> dict[str, object]:
        length = rider.num_steps
        moments = self.moments[: length + 1]
        outcome, control = _outcome_of(rider), self.cohort.control_outcome
        if control is None:
            raise RuntimeError("the cohort has not ended")
        control_accuracy = np.array([np.float32(moment.control[1]) for moment in moments], dtype=np.float64)
        accuracy, growth = reward_components(
            EpisodeColumns(
                val_accuracy=features[:, _VAL].copy(),
                control_val_accuracy=control_accuracy,
                seed_params=features[:, _SEED_PARAMS].copy(),
                host_params=self.cohort.base_params,
                final_val_accuracy=outcome.final_val_accuracy,
                control_final_val_accuracy=control.final_val_accuracy,
                final_seed_params=outcome.seed_params,
            )
        )
        last: list[float | None] = [None] * length
        return {
            "reward_accuracy_points": _padded(accuracy.tolist()),
            "reward_growth_log2": _padded(growth.tolist()),
            "final_val_accuracy": [*last, outcome.final_val_accuracy],
            "control_final_val_accuracy": [*last, control.final_val_accuracy],
            "final_seed_params": [*last, outcome.seed_params],
        }

    def _costs(self, rider: Rider) -> dict[str, Any]:
        k, length = rider.index, rider.num_steps
        costs = [moment.costs for moment in self.moments[1 : length + 1] if moment.costs is not None]
        columns: dict[str, object] = {name: [value] * length for name, value in self._ids(rider).items()}
        columns |= {
            "step": np.arange(1, length + 1),
            "device": [str(self.cohort.data.device)] * length,
            "cpu_s_alone": [float(c.cpu_s_alone_K[k]) for c in costs],
            "cpu_s_shared": [float(c.cpu_s_shared_K[k]) for c in costs],
            "riders": [int(c.riders_K[k]) for c in costs],
        }
        return columns

    def _episode(self, rider: Rider, code_commit: str) -> dict[str, object]:
        k = rider.index
        planned, identity = self.plan.episodes[k], self.identities[k]
        outcome, control = _outcome_of(rider), self.cohort.control_outcome
        if control is None:
            raise RuntimeError("the cohort has not ended")
        ops = [row[0] for row in rider.executed_rows]
        plans = {int(m.decisions.plan_K[k]) for m in self.moments if m.decisions is not None}
        flops = sum(float(m.costs.flops_K[k]) for m in self.moments[1 : rider.num_steps + 1] if m.costs is not None)
        return {
            **self._ids(rider),
            **episode_header(self.plan, planned, identity, code_commit),
            "plan": max(plans) if max(plans) >= 0 else None,
            "branch_parent": self.branch.parent if self.branch else None,
            "branch_step": self.branch.step if self.branch else None,
            "outcome": _how_it_ended(rider),
            "error": None,
            "num_steps": rider.num_steps,
            "final_host_key": rider.lineage.host_key,
            "history_id": hex_digest([list(row) for row in rider.executed_rows], 24),
            "final_val_accuracy": outcome.final_val_accuracy,
            "final_test_accuracy": outcome.final_test_accuracy,
            "uncommitted_val_accuracy": outcome.uncommitted_val_accuracy,
            "uncommitted_test_accuracy": outcome.uncommitted_test_accuracy,
            "control_final_val_accuracy": control.final_val_accuracy,
            "control_final_test_accuracy": control.final_test_accuracy,
            "control_valid": not (self.cohort.trunk.diverged or self.cohort.trunk.num_rollbacks),
            "shapley": outcome.shapley and [_null(points) for points in outcome.shapley],
            "num_rollbacks": rider.lineage.num_rollbacks,
            "data_source": self.cohort.data.source,
            "data_digest": self.cohort.data.digest,
            "host_params": self.cohort.base_params,
            "final_seed_params": outcome.seed_params,
            "num_fossils": outcome.num_fossils,
            **{f"num_{op.name.lower()}": ops.count(op) for op in Op},
            "train_flops": flops,
        }


def episode_header(
    plan: CohortPlan, planned: PlannedEpisode, identity: EpisodeIdentity, code_commit: str
) -> dict[str, object]:
    """Return the columns of an `episodes` row that the plan alone determines."""
    return {
        "environment_id": identity.environment_id,
        "environment_spec": plan.environment.model_dump_json(),
        "replicate": plan.replicate,
        "role": planned.role.value,
        "root": planned.root,
        "controller": planned.controller.name,
        "controller_id": identity.controller_id,
        "controller_spec": json.dumps(planned.controller.model_dump(mode="json"), sort_keys=True),
        "epsilon": planned.epsilon,
        "temperature": planned.temperature,
        "repetition": planned.repetition,
        "engine_version": ENGINE_VERSION,
        "code_commit": code_commit,
        "created_at": datetime.datetime.now(datetime.UTC),
    }


def uncommitted(schema: pa.Schema) -> pa.Schema:
    """Return a table's schema without the columns that a commit adds."""
    return pa.schema([f for f in schema if f.name not in ("commit_id", "attempt")])


def _outcome_of(rider: Rider) -> Outcome:
    if rider.outcome is None:
        raise RuntimeError(f"episode {rider.index} has not ended")
    return rider.outcome


def _how_it_ended(rider: Rider) -> str:
    if rider.diverged:
        return "diverged"
    return "rolled_back" if rider.lineage.num_rollbacks else "completed"


def _null(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _padded(values: list[object]) -> list[object]:
    """Decision values, with null for the final observation."""
    return [*values, None]


def _mask_columns(masks: Bools) -> dict[str, object]:
    weights = 1 << np.arange(NUM_OPS)
    slots = np.zeros((len(masks), NUM_OPS), dtype=np.int64)
    for op in range(1, NUM_OPS):
        part = masks[:, slot_slice(op)]
        slots[:, op] = (part * (1 << np.arange(part.shape[1]))).sum(axis=1)
    return {
        "valid_ops": (masks[:, :NUM_OPS] * weights).sum(axis=1),
        "valid_slots": slots.tolist(),
        "tree_mask": [row.tobytes() for row in pack_mask(masks)],
        "forced": is_forced(masks),
    }


def _action_columns(actions: NDArray[np.int8]) -> dict[str, object]:
    columns: dict[str, object] = {"op": _padded(_OP_NAMES[actions[:, 0]].tolist())}
    for position, name in enumerate(ACTION_FIELDS, start=1):
        columns[name] = _padded(actions[:, position].tolist())
    return columns


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of several episodes as one: making Arrow of each alone costs a third of a cohort's bookkeeping."""
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(first, np.ndarray)
        else [value for part in parts for value in part[name]]
        for name, first in parts[0].items()
    }


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    wanted = uncommitted(schema)
    arrays = []
    for field_ in wanted:
        values = columns[field_.name]
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            missing = ~np.isfinite(values)
            filled = np.where(missing, 0.0, values)
            if pa.types.is_integer(field_.type):
                filled = np.rint(filled).astype(np.int64)
            arrays.append(pa.array(filled, mask=missing).cast(field_.type))
        else:
            arrays.append(pa.array(values, type=field_.type))
    return pa.Table.from_arrays(arrays, schema=wanted)
