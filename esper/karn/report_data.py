"""What a report shows, read from a sealed version and from a run's events."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from esper.karn.store import Version
from esper.leyline.actions import Op
from esper.leyline.events import Event, EventKind
from esper.leyline.identity import Role

TRACED_ROLES = (Role.EVALUATION, Role.DATA)
"""Of each role that a version holds, one cohort per environment is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Validation accuracy of one episode by epoch, and what its controller did.

    Attributes:
        label: The controller, with epsilon or root where they tell episodes apart.
        host_keys: Per observation the lineage it rides, [T + 1].
        accuracy: Per observation, fraction, [T + 1].
        actions: (epoch, op) of every executed action other than WAIT.
        outcome: Validation accuracy of the committed network.
    """

    label: str
    host_keys: tuple[str, ...]
    accuracy: tuple[float, ...]
    actions: tuple[tuple[int, str], ...]
    outcome: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortTrace:
    """One cohort: its trunk and its episodes."""

    environment: str
    role: str
    env_seed: int
    trunk: tuple[float, ...]
    episodes: tuple[Trace, ...]

    @property
    def num_lineages(self) -> int:
        """Distinct host trajectories."""
        return len({key for episode in self.episodes for key in episode.host_keys})


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Episodes of one environment and role."""

    environment: str
    role: str
    episodes: int
    env_seeds: int
    histories: int
    rolled_back: int
    diverged: int
    failed: int
    control_invalid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What was computed: host epochs asked for and computed, and CPU seconds with and without sharing."""

    epochs_asked: int
    epochs_computed: int
    cpu_s_alone: float
    cpu_s_shared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What the events of a run tell.

    Attributes:
        curves: Per policy and metric its (step, value) points in order.
        wall_s: From the first event to the last, None without events.
        num_unreadable: Lines that are no event: cut short by a kill, or not ours.
    """

    curves: dict[str, dict[str, list[tuple[float, float]]]]
    wall_s: float | None
    num_unreadable: int


def read_counts(version: Version) -> list[Counts]:
    """Return the episodes by environment and role."""
    columns = ["environment", "role", "env_seed", "history_id", "outcome", "control_valid"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in version.table("episodes", columns=columns).to_pylist():
        groups[row["environment"], row["role"]].append(row)
    return [
        Counts(
            environment=environment,
            role=role,
            episodes=len(rows),
            env_seeds=len({row["env_seed"] for row in rows}),
            histories=len({row["history_id"] for row in rows}),
            rolled_back=sum(row["outcome"] == "rolled_back" for row in rows),
            diverged=sum(row["outcome"] == "diverged" for row in rows),
            failed=sum(row["outcome"] == "failed" for row in rows),
            control_invalid=sum(not row["control_valid"] for row in rows),
        )
        for (environment, role), rows in sorted(groups.items())
    ]


def read_work(version: Version) -> Work:
    """Return what the version's episodes asked for and what was computed; the trunks always are."""
    asked = pc.sum(version.table("episodes", columns=["num_steps"])["num_steps"]).as_py() or 0
    computed = 0
    columns = ["environment", "env_seed", "host_key", "step", "horizon"]
    steps = version.table("steps", columns=columns)
    if len(steps):
        distinct = steps.group_by(columns[:4], use_threads=False).aggregate([])
        computed = len(distinct) - pc.sum(pc.equal(distinct["step"], 0)).as_py()
        computed += _unridden_trunk_epochs(steps)
    costs = version.table("costs", columns=["cpu_s_alone", "cpu_s_shared"])
    alone, shared = (float(pc.sum(costs[name]).as_py() or 0.0) for name in costs.column_names)
    return Work(epochs_asked=asked, epochs_computed=computed, cpu_s_alone=alone, cpu_s_shared=shared)


def _unridden_trunk_epochs(steps: pa.Table) -> int:
    """Epochs of roots that no episode was riding any more."""
    first = steps.filter(pc.equal(steps["step"], 0))
    roots = first.group_by(["env_seed", "host_key"], use_threads=False).aggregate([("horizon", "max")])
    ridden = steps.filter(pc.is_in(steps["host_key"], pc.unique(first["host_key"])))
    last = ridden.group_by(["env_seed", "host_key"], use_threads=False).aggregate([("step", "max")])
    joined = roots.join(last, keys=["env_seed", "host_key"])
    return int(pc.sum(pc.subtract(joined["horizon_max"], joined["step_max"])).as_py() or 0)


def read_action_shares(version: Version) -> dict[str, dict[str, dict[str, float]]]:
    """Return per environment and controller the share of each op among its decisions that were not forced.

    The candidates of a selection are left out: they are many, and what they do is their name.
    """
    columns = ["environment", "actor", "op"]
    keep = pc.invert(pc.field("is_last")) & pc.invert(pc.field("forced")) & pc.invert(pc.field("replayed"))
    keep &= pc.field("role") != Role.SELECTION.value
    steps = version.table("steps", columns=columns, filter=keep)
    counted = steps.group_by(columns, use_threads=False).aggregate([([], "count_all")])
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in counted.to_pylist():
        counts[row["environment"]][row["actor"]][row["op"]] += row["count_all"]
    return {
        environment: {
            actor: {op.name: ops[op.name] / ops.total() for op in Op} for actor, ops in sorted(actors.items())
        }
        for environment, actors in sorted(counts.items())
    }


def read_traces(version: Version) -> list[CohortTrace]:
    """Return one cohort per environment and traced role: the one of the lowest replicate."""
    columns = ["environment", "role", "env_seed", "replicate"]
    episodes = version.table("episodes", columns=columns).to_pylist()
    found = []
    for environment in sorted({row["environment"] for row in episodes}):
        for role in TRACED_ROLES:
            rows = [row for row in episodes if (row["environment"], row["role"]) == (environment, role.value)]
            if rows:
                chosen = min(rows, key=lambda row: row["replicate"])
                found.append(_cohort_trace(version, environment, role.value, chosen["env_seed"]))
    return found


def _cohort_trace(version: Version, environment: str, role: str, env_seed: int) -> CohortTrace:
    here = (pc.field("environment") == environment) & (pc.field("env_seed") == env_seed) & (pc.field("role") == role)
    columns = ["episode_id", "controller", "epsilon", "root", "repetition", "outcome", "final_val_accuracy"]
    episodes = {row["episode_id"]: row for row in version.table("episodes", columns=columns, filter=here).to_pylist()}
    columns = ["episode_id", "step", "host_key", "val_accuracy", "control_val_accuracy", "op", "executed"]
    by_episode: dict[str, list[dict[str, Any]]] = defaultdict(list)
    trunk: dict[int, float] = {}
    for row in version.table("steps", columns=columns, filter=here).to_pylist():
        if row["control_val_accuracy"] is not None:
            trunk[row["step"]] = row["control_val_accuracy"]
        if row["val_accuracy"] is not None:
            by_episode[row["episode_id"]].append(row)
    labels = _labels(list(episodes.values()))
    return CohortTrace(
        environment=environment,
        role=role,
        env_seed=env_seed,
        trunk=tuple(trunk[step] for step in sorted(trunk)),
        episodes=tuple(
            _trace(rows, labels[episode_id], episodes[episode_id]["final_val_accuracy"])
            for episode_id, rows in by_episode.items()
            if episode_id in episodes and episodes[episode_id]["outcome"] != "failed"
        ),
    )


def _trace(rows: Sequence[Mapping[str, Any]], label: str, outcome: float) -> Trace:
    ordered = sorted(rows, key=lambda row: row["step"])
    return Trace(
        label=label,
        host_keys=tuple(row["host_key"] for row in ordered),
        accuracy=tuple(row["val_accuracy"] for row in ordered),
        actions=tuple(
            (row["step"], row["op"]) for row in ordered if row["executed"] and row["op"] not in (None, Op.WAIT.name)
        ),
        outcome=outcome,
    )


def _labels(episodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Controller names, with the root, epsilon or repetition where that is what tells episodes apart."""
    several = Counter(row["controller"] for row in episodes)
    repeated = Counter((row["controller"], row["epsilon"]) for row in episodes)
    labels = {}
    for row in episodes:
        label = row["controller"]
        if row["root"] != "host":
            label = row["root"]
        elif several[label] > 1 and row["epsilon"] > 0:
            label += f" ε {row['epsilon']:g}"
        elif repeated[label, row["epsilon"]] > 1 and row["root"] == "host" and row["repetition"]:
            label += f" {row['repetition']}"
        labels[row["episode_id"]] = label
    return labels


def read_telemetry(folder: Path) -> Telemetry:
    """Return the learning curves and the wall-clock time in the events of a run's folder; empty without any."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    times: list[datetime] = []
    num_unreadable = 0
    for line in _event_lines(folder):
        try:
            event = Event.model_validate_json(line)
            times.append(datetime.fromisoformat(event.time))
        except (ValidationError, ValueError):
            num_unreadable += 1
            continue
        if event.kind in (EventKind.TRAIN_STEP, EventKind.PPO_UPDATE):
            _add_points(curves, event)
    for metrics in curves.values():
        for points in metrics.values():
            points.sort(key=lambda point: point[0])
    wall_s = (max(times) - min(times)).total_seconds() if times else None
    plain = {policy: dict(metrics) for policy, metrics in curves.items() if metrics}
    return Telemetry(curves=plain, wall_s=wall_s, num_unreadable=num_unreadable)


def _event_lines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("events-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                yield line


def _add_points(curves: dict[str, dict[str, list[tuple[float, float]]]], event: Event) -> None:
    policy = str(event.data.get("policy", event.kind.value))
    step = event.data.get("step", event.data.get("update"))
    if not isinstance(step, int | float):
        return
    for name, value in event.data.items():
        if name in ("policy", "step", "update") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            curves[policy][name].append((float(step), float(value)))
