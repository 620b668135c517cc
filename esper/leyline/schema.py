"""Schemas of the three tables, `steps`, `episodes` and `costs`: every column typed, nullability stated.

`steps` has one row per decision plus the final observation (`is_last`, action null). The row of decision t holds what
was observed before it, the action, and what came after it as reward components; `terminated` says that the episode's
budget (or the host) ended with this transition. Key: (episode_id, step, actor).

Versions that were sealed under an older schema stay readable: `ADDED_IN` names the columns that came later, all of them
nullable, and they are null there; `UPCASTERS` makes rows of one version rows of the next. Nothing else ever changes
under a column's name, so readers of whole files (pyarrow, DuckDB) may fill in the nulls themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

from esper.leyline.actions import LEVERS
from esper.leyline.errors import SchemaError
from esper.leyline.observations import FEATURES

SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1
"""The oldest schema version that this code reads."""

ACTION_FIELDS: tuple[str, ...] = ("action_slot", *(f"action_{lever}" for lever in LEVERS))
"""The columns of an action beside `op`, in tree order."""

_KEY = [
    pa.field("episode_id", pa.string(), nullable=False),
    pa.field("environment", pa.string(), nullable=False),
    pa.field("env_seed", pa.int64(), nullable=False),
]

_COMMIT = [
    pa.field("commit_id", pa.string(), nullable=False),
    pa.field("attempt", pa.int32(), nullable=False),
]


def _feature_fields() -> list[pa.Field]:
    types = {"float": pa.float32(), "int": pa.int32()}
    return [pa.field(column, types[feature.kind]) for feature in FEATURES for column in feature.columns]


STEPS = pa.schema(
    [
        *_KEY,
        pa.field("step", pa.int32(), nullable=False),
        pa.field("actor", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("host_key", pa.string(), nullable=False),
        pa.field("state_id", pa.string(), nullable=False),
        pa.field("is_last", pa.bool_(), nullable=False),
        pa.field("replayed", pa.bool_(), nullable=False),
        *_feature_fields(),
        pa.field("valid_ops", pa.uint16(), nullable=False),
        pa.field("valid_slots", pa.list_(pa.uint8()), nullable=False),
        pa.field("tree_mask", pa.binary(), nullable=False),
        pa.field("forced", pa.bool_(), nullable=False),
        pa.field("op", pa.string()),
        *(pa.field(name, pa.int8()) for name in ACTION_FIELDS),
        pa.field("executed", pa.bool_()),
        pa.field("refused_by", pa.string()),
        pa.field("epsilon", pa.float64(), nullable=False),
        pa.field("temperature", pa.float64()),
        pa.field("plan", pa.int32()),
        pa.field("behaviour_logp", pa.float64()),
        pa.field("op_probs", pa.list_(pa.float64())),
        pa.field("reward_accuracy_points", pa.float64()),
        pa.field("reward_growth_log2", pa.float64()),
        pa.field("control_val_loss", pa.float32()),
        pa.field("control_val_accuracy", pa.float32()),
        pa.field("final_val_accuracy", pa.float64()),
        pa.field("control_final_val_accuracy", pa.float64()),
        pa.field("final_seed_params", pa.int64()),
        pa.field("train_flops", pa.float64(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        *_COMMIT,
    ]
)

EPISODES = pa.schema(
    [
        *_KEY,
        pa.field("environment_id", pa.string(), nullable=False),
        pa.field("environment_spec", pa.string(), nullable=False),
        pa.field("replicate", pa.int64(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("root", pa.string(), nullable=False),
        pa.field("controller", pa.string(), nullable=False),
        pa.field("controller_id", pa.string(), nullable=False),
        pa.field("controller_spec", pa.string(), nullable=False),
        pa.field("epsilon", pa.float64(), nullable=False),
        pa.field("temperature", pa.float64()),
        pa.field("repetition", pa.int32(), nullable=False),
        pa.field("plan", pa.int32()),
        pa.field("branch_parent", pa.string()),
        pa.field("branch_step", pa.int32()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("num_steps", pa.int32(), nullable=False),
        pa.field("final_host_key", pa.string()),
        pa.field("history_id", pa.string(), nullable=False),
        pa.field("final_val_accuracy", pa.float64()),
        pa.field("final_test_accuracy", pa.float64()),
        pa.field("uncommitted_val_accuracy", pa.float64()),
        pa.field("uncommitted_test_accuracy", pa.float64()),
        pa.field("control_final_val_accuracy", pa.float64()),
        pa.field("control_final_test_accuracy", pa.float64()),
        pa.field("control_valid", pa.bool_(), nullable=False),
        pa.field("shapley", pa.list_(pa.float64())),
        pa.field("num_rollbacks", pa.int32()),
        pa.field("data_source", pa.string()),
        pa.field("data_digest", pa.string()),
        pa.field("host_params", pa.int64(), nullable=False),
        pa.field("final_seed_params", pa.int64(), nullable=False),
        pa.field("num_fossils", pa.int32(), nullable=False),
        pa.field("num_wait", pa.int32(), nullable=False),
        pa.field("num_germinate", pa.int32(), nullable=False),
        pa.field("num_advance", pa.int32(), nullable=False),
        pa.field("num_fossilize", pa.int32(), nullable=False),
        pa.field("num_prune", pa.int32(), nullable=False),
        pa.field("train_flops", pa.float64(), nullable=False),
        pa.field("engine_version", pa.string(), nullable=False),
        pa.field("code_commit", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        *_COMMIT,
    ]
)

COSTS = pa.schema(
    [
        *_KEY,
        pa.field("step", pa.int32(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("cpu_s_alone", pa.float64(), nullable=False),
        pa.field("cpu_s_shared", pa.float64(), nullable=False),
        pa.field("riders", pa.int32(), nullable=False),
        *_COMMIT,
    ]
)

SCHEMAS: dict[str, pa.Schema] = {"steps": STEPS, "costs": COSTS, "episodes": EPISODES}
"""The tables in the order in which they are committed: an episode exists iff its `episodes` row does."""

NOT_IN_DIGEST = frozenset({"commit_id", "attempt", "code_commit", "created_at"})
"""Columns that a rerun of the same spec may change."""

OUTCOMES = ("completed", "diverged", "rolled_back", "failed")


ADDED_IN: dict[str, dict[str, int]] = {
    "steps": {column: feature.since for feature in FEATURES for column in feature.columns if feature.since > 1},
    "costs": {},
    "episodes": dict.fromkeys(("shapley", "num_rollbacks", "data_source", "data_digest"), 2),
}
"""By table and column the schema version that brought it; columns that are not here were there from the first."""


def columns_under(table: str, schema_version: int) -> list[str]:
    """Return the columns that a table had under a schema version, in today's order."""
    since = ADDED_IN[table]
    return [name for name in SCHEMAS[table].names if since.get(name, OLDEST_SCHEMA) <= schema_version]


def schema_version_of(table: str, columns: Iterable[str]) -> int:
    """Return the schema version under which rows with these columns were written."""
    since = ADDED_IN[table]
    return max((since[name] for name in columns if name in since), default=OLDEST_SCHEMA)


def _gains_columns_of(schema_version: int) -> Callable[[str, pa.Table], pa.Table]:
    def upcaster(table: str, rows: pa.Table) -> pa.Table:
        for name, since in ADDED_IN[table].items():
            if since == schema_version and name not in rows.column_names:
                field = SCHEMAS[table].field(name)
                rows = rows.append_column(field, pa.nulls(len(rows), field.type))
        return rows

    return upcaster


UPCASTERS: dict[int, Callable[[str, pa.Table], pa.Table]] = {1: _gains_columns_of(2)}
"""By schema version, what makes rows of a table written under it rows of the next version."""


def upcast(table: str, rows: pa.Table, schema_version: int) -> pa.Table:
    """Return whole rows of a table, written under a schema version, as rows of today's.

    Columns come in today's order; the commit columns are there where the rows have them.

    Raises:
        SchemaError: A newer Esper wrote them, or they are older than what is read.
    """
    if not OLDEST_SCHEMA <= schema_version <= SCHEMA_VERSION:
        raise SchemaError(
            f"rows of {table!r} have schema version {schema_version}\n"
            f"  expected: {OLDEST_SCHEMA} to {SCHEMA_VERSION}, which this installation reads; update esper"
        )
    for version in range(schema_version, SCHEMA_VERSION):
        rows = UPCASTERS[version](table, rows)
    return rows.select([name for name in SCHEMAS[table].names if name in rows.column_names])


def deterministic_columns(table: str, schema_version: int = SCHEMA_VERSION) -> list[str]:
    """Return the columns that the digest of a dataset of a schema version covers (`costs` has none)."""
    if table == "costs":
        return []
    return [name for name in columns_under(table, schema_version) if name not in NOT_IN_DIGEST]
