"""Synthetic tables: consistent in every column that a check can recompute, and made without torch in milliseconds."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from synthetic_host import Trajectory, blueprint_params, host_params

from esper.leyline.actions import (
    ACTION_WIDTH,
    BLENDS,
    Actions,
    Blend,
    Op,
    action_from_row,
    is_forced,
    pack_mask,
    slot_slice,
)
from esper.leyline.controller_specs import HEURISTIC, ControllerSpec, NeverAct, ScheduleSampler, behaviour
from esper.leyline.identity import ENGINE_VERSION, EVALUATION_START, SELECTION_START, Role
from esper.leyline.keys import canonical_json, hex_digest, numpy_generator
from esper.leyline.library import load
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.rewards import EpisodeColumns, RewardSpec, reward_components
from esper.leyline.schema import ACTION_FIELDS, COSTS, EPISODES, SCHEMAS, STEPS
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.tree import log_prob, log_softmax, sample, uniform_logits

Tables = dict[str, pa.Table]

ROLE_START = {"data": 0, "online": 0, "selection": SELECTION_START, "evaluation": EVALUATION_START}
CPU_S_PER_EPOCH = 0.04
FLOPS_PER_EPOCH = 1e9


def synthetic_tables(
    *,
    environment: str = "digits-gap",
    num_env_seeds: int = 2,
    behaviours: Sequence[str] = ("baseline", "random"),
    horizon: int = 6,
    seed: int = 0,
    role: str = "data",
    epsilons: Sequence[float] = (0.0, 0.2),
    refusal_rate: float = 0.0,
    first_replicate: int = 0,
) -> Tables:
    """Return `steps`, `costs` and `episodes` without commit columns.

    Args:
        environment: A name under datasets/environments; its horizon is replaced.
        num_env_seeds: Cohorts.
        behaviours: Names of the eleven behaviours, `heuristic`, `never-act` or `schedule-sampler`.
        horizon: Decisions per episode.
        seed: Changes the made-up accuracies and the exploration, not the ids.
        role: What the episodes were made for; it decides the range of replicates.
        epsilons: One episode each per rule; `random` has 1, `never-act` and `schedule-sampler` have 0.
        refusal_rate: Share of ADVANCE and FOSSILIZE that a gate refuses.
        first_replicate: Offset into the role's range of replicates.
    """
    spec = load("environments", environment, EnvironmentSpec).model_copy(update={"horizon": horizon})
    reward = load("rewards", environment, RewardSpec)
    episodes = tuple(_plan(spec, behaviours, epsilons, Role(role)))
    start = ROLE_START[role] + first_replicate
    parts = []
    for replicate in range(start, start + num_env_seeds):
        plan = CohortPlan(environment=spec, reward=reward, replicate=replicate, episodes=episodes)
        key = (plan.model_dump_json(), seed, refusal_rate)
        if key not in _MADE:
            _MADE[key] = _cohort(plan, seed, refusal_rate)
        parts.append(_MADE[key])
    return concat_tables(*parts)


_MADE: dict[tuple[str, int, float], Tables] = {}
"""Cohorts that this process has made: many tests ask for the same few."""


def concat_tables(*parts: Mapping[str, pa.Table]) -> Tables:
    """Return the rows of several sets of tables as one."""
    return {name: pa.concat_tables([part[name] for part in parts]) for name in SCHEMAS}


def select_episodes(tables: Mapping[str, pa.Table], episode_ids: Sequence[str]) -> Tables:
    """Return the rows of some episodes."""
    wanted = pa.array(list(episode_ids))
    return {name: table.filter(pa.compute.is_in(table["episode_id"], wanted)) for name, table in tables.items()}


def _plan(
    spec: EnvironmentSpec, behaviours: Sequence[str], epsilons: Sequence[float], role: Role
) -> list[PlannedEpisode]:
    planned = []
    for name in behaviours:
        controller: ControllerSpec
        values, repetitions = tuple(epsilons), 1
        if name == "schedule-sampler":
            controller = ScheduleSampler(
                pool="synthetic", num_plans=2, num_slots=spec.host.num_slots, max_birth_epoch=2
            )
            values, repetitions = (0.0,), 2
        elif name == "never-act":
            controller, values = NeverAct(), (0.0,)
        elif name == "heuristic":
            controller = HEURISTIC
        else:
            controller = behaviour(name)
            values = (1.0,) if name == "random" else values
        planned += [
            PlannedEpisode(controller=controller, epsilon=epsilon, repetition=repetition, role=role)
            for epsilon in values
            for repetition in range(repetitions)
        ]
    return planned


@dataclass
class _Run:
    """One episode while it runs."""

    planned: PlannedEpisode
    episode_id: str
    host: Trajectory
    rows: list[dict[str, Any]] = field(default_factory=list)
    acted: list[list[int]] = field(default_factory=list)

    @property
    def is_sampler(self) -> bool:
        return isinstance(self.planned.controller, ScheduleSampler)

    @property
    def plan(self) -> int | None:
        return self.planned.repetition if self.is_sampler else None


def _cohort(plan: CohortPlan, seed: int, refusal_rate: float) -> Tables:
    spec = plan.environment
    runs = [
        _Run(planned, episode_id, Trajectory(spec, plan.env_seed, seed))
        for planned, episode_id in zip(plan.episodes, plan.episode_ids())
    ]
    rules = LeverRules.of(spec, blueprint_params(spec))
    for step in range(spec.horizon + 1):
        observed = [run.host.observe() for run in runs]
        columns = {name: np.array([obs[name] for obs in observed], np.float32) for name in FEATURE_COLUMNS}
        masks = build_mask(columns, rules)
        uniform = log_softmax(uniform_logits(len(runs)), masks)
        for index, run in enumerate(runs):
            row = _observation_row(run, plan, observed[index], masks[index])
            if step < spec.horizon:
                _decide(run, row, masks[[index]], uniform[[index]], seed, refusal_rate)
            run.rows.append(row)
    riders = Counter((step, row["host_key"]) for run in runs for step, row in enumerate(run.rows))
    finished = [_finish(run, plan) for run in runs]
    costs = [_cost_row(run, step, riders) for run in runs for step in range(1, spec.horizon + 1)]
    return {
        "steps": _table([row for run in runs for row in run.rows], STEPS),
        "costs": _table(costs, COSTS),
        "episodes": _table(finished, EPISODES),
    }


def _key(run: _Run, plan: CohortPlan) -> dict[str, Any]:
    return {"episode_id": run.episode_id, "environment": plan.environment.name, "env_seed": plan.env_seed}


def _observation_row(run: _Run, plan: CohortPlan, observed: dict[str, float], mask: np.ndarray) -> dict[str, Any]:
    step, planned = run.host.step, run.planned
    slots = [int(np.packbits(mask[slot_slice(op)], bitorder="little")[0]) if op else 0 for op in Op]
    control = run.host.trunk_accuracy(step)
    return {
        **_key(run, plan),
        **{name: None if np.isnan(value) else value for name, value in observed.items()},
        "step": step,
        "actor": planned.controller.name,
        "role": planned.role.value,
        "host_key": run.host.host_key,
        "state_id": run.host.state_id(),
        "is_last": step == plan.environment.horizon,
        "replayed": False,
        "valid_ops": int(sum(1 << op for op in Op if mask[op])),
        "valid_slots": slots,
        "tree_mask": pack_mask(mask[None])[0].tobytes(),
        "forced": bool(is_forced(mask[None])[0]),
        "epsilon": planned.epsilon,
        "temperature": planned.temperature,
        "plan": run.plan,
        "control_val_loss": 2.4 - 2 * control,
        "control_val_accuracy": control,
        "train_flops": FLOPS_PER_EPOCH * (1 + 0.1 * sum(slot.levers[0] >= 0 for slot in run.host.slots)),
        "terminated": step == plan.environment.horizon - 1,
        "truncated": False,
    }


def greedy_action(name: str, mask: np.ndarray, host: Trajectory, offset: int) -> Actions:
    """Return a rule's action: germinate when nothing is alive, then see the seed through."""
    row = np.zeros((1, ACTION_WIDTH), dtype=np.int8)
    if name == "never-act":
        return row
    for op in (Op.FOSSILIZE, Op.ADVANCE):
        if mask[op]:
            row[0, :2] = op, int(np.flatnonzero(mask[slot_slice(op)])[0])
            return row
    if name == "anti-kasmina" and mask[Op.PRUNE] and host.step % 4 == 3:
        row[0, :2] = Op.PRUNE, int(np.flatnonzero(mask[slot_slice(Op.PRUNE)])[0])
        return row
    waits = len(name) % 2 if offset == 0 else 0
    if mask[Op.GERMINATE] and not mask[Op.PRUNE] and host.step >= waits:
        slot = int(np.flatnonzero(mask[slot_slice(Op.GERMINATE)])[0])
        # Levers differ by slot, so that rules alone take values that chance may leave out.
        blend, seed_lr = (BLENDS.index(Blend.GATED), 2) if slot % 2 else (BLENDS.index(Blend.LINEAR), 1)
        row[0] = Op.GERMINATE, slot, (len(name) + offset + 3 * slot) % 8, blend, 0, 0, 1, seed_lr
    return row


def _decide(
    run: _Run, row: dict[str, Any], mask: np.ndarray, uniform: np.ndarray, seed: int, refusal_rate: float
) -> None:
    planned = run.planned
    epsilon = planned.epsilon
    generator = numpy_generator(seed, run.episode_id, run.host.step)
    coin, *draws = generator.random(1 + ACTION_WIDTH)
    greedy = greedy_action(planned.controller.name, mask[0], run.host, planned.repetition)
    action = sample(uniform, mask, np.array([draws])) if coin < epsilon else greedy
    density = epsilon * float(np.exp(log_prob(uniform, action, mask))[0]) + (1 - epsilon) * float(
        (action == greedy).all()
    )
    op_probs = epsilon * np.exp(uniform[0, : len(Op)]) + (1 - epsilon) * (np.arange(len(Op)) == greedy[0, 0])
    op = action_from_row(action[0]).op
    gated = {Op.ADVANCE: "G2", Op.FOSSILIZE: "G5"}.get(op)
    draw = numpy_generator("refusal", run.host.state_id(), int(op)).random()
    refused = gated is not None and draw < refusal_rate
    row |= {
        "op": op.name,
        **{name: int(value) for name, value in zip(ACTION_FIELDS, action[0, 1:])},
        "executed": not refused,
        "refused_by": gated if refused else None,
        "behaviour_logp": None if run.is_sampler else float(np.log(density)),
        "op_probs": None if run.is_sampler else op_probs.tolist(),
    }
    if not refused and op is not Op.WAIT:
        run.acted.append([run.host.step, *(int(v) for v in action[0])])
    run.host.apply(action[0], refused)


def _finish(run: _Run, plan: CohortPlan) -> dict[str, Any]:
    """Fill in the rewards and the outcome; return the row of `episodes`."""
    host, planned, trunk = run.host, run.planned, Trajectory(plan.environment, plan.env_seed, run.host.noise_seed)
    trunk.step = host.step
    final = host.final_accuracy("val", committed=True)
    control = trunk.final_accuracy("val", committed=True)
    _reward(run, plan, final, control)
    outcome = {
        "final_val_accuracy": final,
        "control_final_val_accuracy": control,
        "final_seed_params": host.committed_params(),
    }
    run.rows[-1] |= outcome
    ops = Counter(row["op"] for row in run.rows[:-1])
    return {
        **_key(run, plan),
        **outcome,
        **{f"num_{op.name.lower()}": ops[op.name] for op in Op},
        "environment_id": plan.environment.spec_id,
        "environment_spec": canonical_json(plan.environment.model_dump(mode="json")),
        "replicate": plan.replicate,
        "role": planned.role.value,
        "root": planned.root,
        "controller": planned.controller.name,
        "controller_id": planned.controller.spec_id,
        "controller_spec": canonical_json(planned.controller.model_dump(mode="json")),
        "epsilon": planned.epsilon,
        "temperature": planned.temperature,
        "repetition": planned.repetition,
        "plan": run.plan,
        "outcome": "completed",
        "num_steps": plan.environment.horizon,
        "final_host_key": host.host_key,
        "history_id": hex_digest(run.acted, 24),
        "final_test_accuracy": host.final_accuracy("test", committed=True),
        "uncommitted_val_accuracy": host.final_accuracy("val", committed=False),
        "uncommitted_test_accuracy": host.final_accuracy("test", committed=False),
        "control_final_test_accuracy": trunk.final_accuracy("test", committed=True),
        "control_valid": True,
        "num_rollbacks": 0,
        "data_source": "synthetic",
        "data_digest": hex_digest(["synthetic", plan.environment.task.kind], 16),
        "host_params": host_params(plan.environment),
        "num_fossils": sum(slot.stage.name == "FOSSILIZED" for slot in host.slots),
        "train_flops": sum(row["train_flops"] for row in run.rows[:-1]),
        "engine_version": ENGINE_VERSION,
        "code_commit": "synthetic",
        "created_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    }


def _reward(run: _Run, plan: CohortPlan, final: float, control: float) -> None:
    accuracy, growth = reward_components(
        EpisodeColumns(
            val_accuracy=np.array([row["val_accuracy"] for row in run.rows]),
            control_val_accuracy=np.array([row["control_val_accuracy"] for row in run.rows]),
            seed_params=np.array([float(row["seed_params"]) for row in run.rows]),
            host_params=float(host_params(plan.environment)),
            final_val_accuracy=final,
            control_final_val_accuracy=control,
            final_seed_params=float(run.host.committed_params()),
        )
    )
    for row, points, doublings in zip(run.rows, accuracy, growth):
        row |= {"reward_accuracy_points": float(points), "reward_growth_log2": float(doublings)}


def _cost_row(run: _Run, step: int, riders: Mapping[tuple[int, str], int]) -> dict[str, Any]:
    row = run.rows[step]
    sharing = riders[step, row["host_key"]]
    return {
        **{name: row[name] for name in ("episode_id", "environment", "env_seed")},
        "step": step - 1,
        "device": "cpu",
        "cpu_s_alone": CPU_S_PER_EPOCH,
        "cpu_s_shared": CPU_S_PER_EPOCH / sharing,
        "riders": sharing,
    }


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    fields = [item for item in schema if item.name not in ("commit_id", "attempt")]
    table = {item.name: pa.array([_cast(row.get(item.name), item.type) for row in rows], item.type) for item in fields}
    return pa.table(table, schema=pa.schema(fields))


def _cast(value: Any, kind: pa.DataType) -> Any:
    return int(value) if value is not None and pa.types.is_integer(kind) else value
