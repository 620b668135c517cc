"""Rows for episodes that could not be run: nothing that was planned vanishes."""

from __future__ import annotations

import datetime

import pyarrow as pa

from esper.leyline.identity import ENGINE_VERSION, EpisodeIdentity
from esper.leyline.keys import hex_digest
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.schema import SCHEMAS

_COMMIT_COLUMNS = ("commit_id", "attempt")
_COUNTS = ("num_steps", "host_params", "final_seed_params", "num_fossils")
_OPS = ("num_wait", "num_germinate", "num_advance", "num_fossilize", "num_prune")


def uncommitted_schema(table: str) -> pa.Schema:
    """Return a table's schema without the columns that a commit adds."""
    return pa.schema([field for field in SCHEMAS[table] if field.name not in _COMMIT_COLUMNS])


def failed_tables(plan: CohortPlan, error: Exception) -> dict[str, pa.Table]:
    """Return tables in which every episode and branch of the plan has outcome `failed` and the error; no steps."""
    from esper.tolaria.runtime import code_commit

    schema = uncommitted_schema("episodes")
    common = {"error": str(error), "code_commit": code_commit(), "created_at": datetime.datetime.now(datetime.UTC)}
    rows = [_row(plan, episode, plan.identity(episode)) | common for episode in plan.episodes]
    rows += [_row(plan, branch.then, plan.branch_identity(branch)) | common for branch in plan.branches]
    return {
        "steps": uncommitted_schema("steps").empty_table(),
        "costs": uncommitted_schema("costs").empty_table(),
        "episodes": pa.Table.from_pylist(rows, schema=schema),
    }


def _row(plan: CohortPlan, episode: PlannedEpisode, identity: EpisodeIdentity) -> dict[str, object]:
    parent, step, _ = identity.branch or (None, None, ())
    row: dict[str, object] = dict.fromkeys(uncommitted_schema("episodes").names)
    row |= dict.fromkeys((*_COUNTS, *_OPS), 0)
    return row | {
        "episode_id": identity.episode_id,
        "environment": plan.environment.name,
        "env_seed": plan.env_seed,
        "environment_id": plan.environment.spec_id,
        "environment_spec": plan.environment.model_dump_json(),
        "replicate": plan.replicate,
        "role": episode.role.value,
        "root": identity.root,
        "branch_parent": parent,
        "branch_step": step,
        "controller": episode.controller.name,
        "controller_id": episode.controller.spec_id,
        "controller_spec": episode.controller.model_dump_json(),
        "epsilon": episode.epsilon,
        "temperature": episode.temperature,
        "repetition": episode.repetition,
        "outcome": "failed",
        "history_id": hex_digest([], 24),
        "control_valid": False,
        "train_flops": 0.0,
        "engine_version": ENGINE_VERSION,
    }
