"""Is every episode whole, and every value there: order, keys, nulls, finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.observations import slot_column
from esper.leyline.schema import ACTION_FIELDS, EPISODES, STEPS
from quality.measures import Measure, offences, rows

_BROKEN = """
SELECT environment, concat('episode ', episode_id, ': ', coalesce(num_distinct, 0), ' of ', num_steps + 1,
    ' steps, ', coalesce(finals, 0), ' final observations') AS example
FROM health_episodes WHERE broken AND NOT failed
UNION ALL
SELECT environment, concat('episode ', episode_id, ' has steps but no row in episodes') AS example
FROM (SELECT DISTINCT environment, episode_id FROM steps) ANTI JOIN episodes USING (episode_id)
"""

_OBSERVED = ("val_loss", "val_accuracy", "seed_params", "host_params", "num_slots", "max_seeds", "max_fossils")
_DECIDED = ("op", "executed", "reward_accuracy_points", "reward_growth_log2", *ACTION_FIELDS)
_FINAL = ("final_val_accuracy", "control_final_val_accuracy", "final_seed_params")


def _required(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    stages = [slot_column(slot, "stage") for slot in range(MAX_SLOTS)]
    always = " OR ".join(f"{column} IS NULL" for column in (*_OBSERVED, *stages))
    decided = " OR ".join(f"{column} IS NULL" for column in _DECIDED)
    final = " OR ".join(f"{column} IS NULL" for column in _FINAL)
    wrong = f"({always}) OR (NOT is_last AND ({decided})) OR (is_last AND (op IS NOT NULL OR {final}))"
    relation = (
        connection.sql("FROM health_rows")
        .filter(wrong)
        .project("environment, concat('episode ', episode_id, ' step ', step) AS example")
    )
    return offences("required_values", names, relation, sound="nothing that is required is null")


def float_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the floating-point columns."""
    return [item.name for item in schema if pa.types.is_floating(item.type)]


def _finite(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    counts: dict[str, dict[str, int]] = {name: {} for name in names}
    for table, schema in (("steps", STEPS), ("episodes", EPISODES)):
        columns = float_columns(schema)
        sums = ", ".join(f"count(*) FILTER (NOT isfinite({column})) AS {column}" for column in columns)
        for row in rows(connection.table(table).aggregate(f"environment, {sums}")):
            found = counts.setdefault(row.pop("environment"), {})
            found.update({f"{table}.{column}": number for column, number in row.items() if number})
    out = []
    for name, found in counts.items():
        worst = ", ".join(f"{column} ({number})" for column, number in list(found.items())[:5])
        message = f"NaN or infinite: {worst}" if found else "every number is finite"
        out.append(Measure(check="finite_values", environment=name, value=float(sum(found.values())), message=message))
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `structure`, `required_values` and `finite_values` of every environment."""
    broken = connection.sql(_BROKEN)
    return [
        *offences("structure", names, broken, unit="broken episodes", sound="every episode is whole"),
        *_required(connection, names),
        *_finite(connection, names),
    ]
