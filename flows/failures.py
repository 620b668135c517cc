"""Cohorts that cannot be run: whether to try again, and the rows by which nothing that was planned vanishes."""

from __future__ import annotations

import datetime

import pyarrow as pa

from esper.leyline.errors import EsperError
from esper.leyline.identity import ENGINE_VERSION, EpisodeIdentity
from esper.leyline.keys import hex_digest
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.schema import SCHEMAS
from esper.leyline.secrets import mask
from esper.tolaria.workers import WorkerDiedError

MAX_TRIES = 3
"""Of a cohort in one run: accidents, such as a worker that was killed, seldom come three times."""

_COMMIT_COLUMNS = ("commit_id", "attempt")
_COUNTS = ("num_steps", "host_params", "final_seed_params", "num_fossils")
_OPS = ("num_wait", "num_germinate", "num_advance", "num_fossilize", "num_prune")


class GenerationError(EsperError):
    """Some of the episodes that were planned could not be run; everything else is stored."""


class Tries:
    """Whether to try a cohort again after an error: not after one that came before, for it will come again.

    A worker process that died is an accident however often it dies; that ends with the last try.

    Args:
        at_most: Tries in all.
    """

    def __init__(self, at_most: int = MAX_TRIES) -> None:
        self.at_most = at_most
        self._seen: list[tuple[str, str]] = []

    def __call__(self, error: Exception) -> bool:
        """Note an error; return whether another try is of use."""
        kind = (type(error).__name__, str(error))
        is_new = kind not in self._seen
        self._seen.append(kind)
        return len(self._seen) < self.at_most and (is_new or isinstance(error, WorkerDiedError))


def uncommitted_schema(table: str) -> pa.Schema:
    """Return a table's schema without the columns that a commit adds."""
    return pa.schema([field for field in SCHEMAS[table] if field.name not in _COMMIT_COLUMNS])


def failed_tables(plan: CohortPlan, error: Exception) -> dict[str, pa.Table]:
    """Return tables in which every episode and branch of the plan has outcome `failed` and the error; no steps."""
    from esper.tolaria.runtime import code_commit

    schema = uncommitted_schema("episodes")
    common = {
        "error": mask(str(error)),
        "code_commit": code_commit(),
        "created_at": datetime.datetime.now(datetime.UTC),
    }
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
