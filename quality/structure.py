"""Is every episode whole, and every value there: schema, order, keys, nulls, ends, finite numbers, ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.observations import FEATURES, slot_column
from esper.leyline.schema import ACTION_FIELDS, EPISODES, SCHEMA_VERSION, SCHEMAS, STEPS, columns_under
from quality.measures import WHOLE, Measure, offences, rows
from quality.profile import Profile

OPTIONAL_COLUMNS = frozenset({"commit_id", "attempt"})

_BROKEN = """
SELECT environment, episode_id, NULL::INTEGER AS step, concat(coalesce(num_distinct, 0), ' of ', num_steps + 1,
    ' steps, ', coalesce(finals, 0), ' final observations') AS found
FROM health_episodes WHERE broken AND NOT failed
UNION ALL
SELECT environment, episode_id, NULL::INTEGER AS step, 'has steps but no row in episodes' AS found
FROM (SELECT DISTINCT environment, episode_id FROM steps) ANTI JOIN episodes USING (episode_id)
"""

_OBSERVED = ("val_loss", "val_accuracy", "seed_params", "host_params", "num_slots", "max_seeds", "max_fossils")
_DECIDED = ("op", "executed", "reward_accuracy_points", "reward_growth_log2", *ACTION_FIELDS)
_FINAL = ("final_val_accuracy", "control_final_val_accuracy", "final_seed_params")

_ENDS = """
SELECT environment, episode_id, step, CASE
    WHEN is_last THEN 'the final observation is marked as an end'
    WHEN step < num_steps - 1 THEN 'marked as an end before the last decision'
    WHEN NOT (terminated OR truncated) THEN 'the last decision is not marked as an end'
    ELSE concat('completed after ', num_steps, ' of ', limit_steps, ' decisions') END AS found
FROM (
    SELECT c.environment, c.episode_id, c.step, c.is_last, c.terminated, c.truncated, e.num_steps,
        e.horizon AS limit_steps, e.outcome
    FROM health_core AS c JOIN health_episodes AS e USING (number)
)
WHERE (terminated OR truncated) <> (step = num_steps - 1)
    OR (step = num_steps - 1 AND outcome = 'completed' AND NOT truncated AND num_steps <> limit_steps)
"""


def broken(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the episodes with a gap, a missing or second final observation, or no row in `episodes`."""
    return connection.sql(_BROKEN)


def wrong_ends(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows whose end flags contradict the episode's length and outcome."""
    return connection.sql(_ENDS)


def missing(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows in which a required column is null."""
    stages = [slot_column(slot, "stage") for slot in range(MAX_SLOTS)]
    parts = [f"CASE WHEN {name} IS NULL THEN '{name}' END" for name in (*_OBSERVED, *stages)]
    parts += [f"CASE WHEN NOT is_last AND {name} IS NULL THEN '{name}' END" for name in _DECIDED]
    parts += [f"CASE WHEN is_last AND {name} IS NULL THEN '{name}' END" for name in _FINAL]
    always = " OR ".join(f"{column} IS NULL" for column in (*_OBSERVED, *stages))
    decided = " OR ".join(f"{column} IS NULL" for column in _DECIDED)
    final = " OR ".join(f"{column} IS NULL" for column in _FINAL)
    wrong = f"({always}) OR (NOT is_last AND ({decided})) OR (is_last AND (op IS NOT NULL OR {final}))"
    told = f"concat('null: ', concat_ws(', ', {', '.join(parts)}), CASE WHEN is_last THEN ' op' || op END)"
    return connection.table("health_rows").filter(wrong).project(f"environment, episode_id, step, {told} AS found")


def _suspects(connection: duckdb.DuckDBPyConnection, tests: Mapping[str, str]) -> duckdb.DuckDBPyRelation:
    """Return the rows of `steps` for which any column's test holds, with the columns and values found."""
    if not tests:
        return connection.sql(
            "SELECT environment, episode_id, step, '' AS found FROM (SELECT * FROM steps LIMIT 0) WHERE false"
        )
    told = ", ".join(f"CASE WHEN {test} THEN concat('{name} = ', {name}) END" for name, test in tests.items())
    wrong = " OR ".join(f"coalesce({test}, false)" for test in tests.values())
    return (
        connection.table("steps")
        .filter(wrong)
        .project(f"environment, episode_id, step, concat_ws(', ', {told}) AS found")
    )


def not_finite(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows of `steps` that hold a NaN or an infinity."""
    return _suspects(connection, {name: f"NOT isfinite({name})" for name in float_columns(STEPS)})


def out_of_range(
    connection: duckdb.DuckDBPyConnection, columns: Sequence[str] | None = None
) -> duckdb.DuckDBPyRelation:
    """Return the rows of `steps` in which a feature lies outside its registered range."""
    limits = feature_limits()
    chosen = limits if columns is None else {name: limits[name] for name in columns}
    return _suspects(
        connection,
        {name: f"isfinite({name}::DOUBLE) AND NOT {_within(name, *bounds)}" for name, bounds in chosen.items()},
    )


RANGE_SLACK = 1e-5
"""Features are float32: 1 may be stored as 1.0000001."""


def _within(name: str, low: float, high: float) -> str:
    least = f"'{low}'::DOUBLE" if low == -float("inf") else str(low - RANGE_SLACK)
    most = f"'{high}'::DOUBLE" if high == float("inf") else str(high + RANGE_SLACK)
    return f"{name} BETWEEN {least} AND {most}"


def feature_limits() -> dict[str, tuple[float, float]]:
    """Return the registered range of every feature column."""
    return {column: (feature.low, feature.high) for feature in FEATURES for column in feature.columns}


def float_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the floating-point columns."""
    return [item.name for item in schema if pa.types.is_floating(item.type)]


def _finite(connection: duckdb.DuckDBPyConnection, names: Sequence[str], profile: Profile) -> list[Measure]:
    suspects = profile.not_finite(float_columns(STEPS))
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for table, columns in (("steps", suspects), ("episodes", float_columns(EPISODES))):
        if not columns:
            continue
        sums = ", ".join(f"count(*) FILTER (NOT isfinite({column})) AS {column}" for column in columns)
        for row in rows(connection.table(table).aggregate(f"environment, {sums}")):
            counted = found.setdefault(row.pop("environment"), {})
            counted.update({f"{table}.{column}": number for column, number in row.items() if number})
    out = []
    for name, counted in found.items():
        worst = ", ".join(f"{column} ({number})" for column, number in list(counted.items())[:5])
        message = f"NaN or infinite: {worst}" if counted else "every number is finite"
        value = float(sum(counted.values()))
        out.append(Measure(check="finite_values", environment=name, value=value, message=message))
    return out


def _ranges(names: Sequence[str], profile: Profile) -> list[Measure]:
    limits = feature_limits()
    out = []
    for name in names:
        outside = []
        for column, (low, high) in limits.items():
            least, most = profile.extremes(name, column)
            if least is not None and most is not None and (least < low - RANGE_SLACK or most > high + RANGE_SLACK):
                outside.append(f"{column} in [{least:.4g}, {most:.4g}], registered [{low:g}, {high:g}]")
        message = "; ".join(outside[:4]) if outside else "every feature lies in its registered range"
        out.append(
            Measure(check="feature_ranges", environment=name, value=float(len(outside)), message=message),
        )
    return out


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list of {_kind(kind.value_type)}"
    for test, name in (
        (pa.types.is_integer, "integer"),
        (pa.types.is_floating, "float"),
        (pa.types.is_boolean, "boolean"),
        (pa.types.is_timestamp, "timestamp"),
        (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t), "string"),
        (lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t), "binary"),
    ):
        if test(kind):
            return name
    return str(kind)


def schema_problems(table: str, found: pa.Schema, schema_version: int = SCHEMA_VERSION) -> list[str]:
    """Return how a table's columns differ from those of a schema version: what lacks, and what is of another kind."""
    problems = []
    for name in columns_under(table, schema_version):
        item = SCHEMAS[table].field(name)
        if item.name in OPTIONAL_COLUMNS:
            continue
        if item.name not in found.names:
            problems.append(f"{table}.{item.name} is missing")
        elif _kind(found.field(item.name).type) != _kind(item.type):
            problems.append(f"{table}.{item.name} is {found.field(item.name).type}, expected {item.type}")
    return problems


def stale(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return how the tables behind a connection differ from leyline's schema."""
    out = []
    for table in ("steps", "episodes"):
        out += schema_problems(table, connection.table(table).limit(0).to_arrow_table().schema)
    return out


def measure_schema(problems: Sequence[str]) -> list[Measure]:
    """Return `schema` of the whole dataset."""
    shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
    message = shown or "every column is there, with its type"
    return [Measure(check="schema", environment=WHOLE, value=float(len(problems)), message=message)]


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str], profile: Profile) -> list[Measure]:
    """Return the structure checks of every environment, `schema` apart."""
    whole, ends = "every episode is whole", "every episode ends where its length and outcome say"
    return [
        *offences("structure", names, broken(connection), unit="broken episodes", sound=whole),
        *offences("required_values", names, missing(connection), sound="nothing that is required is null"),
        *offences("episode_ends", names, wrong_ends(connection), sound=ends),
        *_finite(connection, names, profile),
        *_ranges(names, profile),
    ]
