"""A measured quantity, before it is held against a threshold, and the two ways in which SQL yields one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

WHOLE = "all"
"""The name under which a quantity of the whole dataset stands beside those of its environments."""

Offences = Callable[[duckdb.DuckDBPyConnection], duckdb.DuckDBPyRelation]
"""Returns a check's offending rows: columns `environment`, `episode_id`, `step` (null: the episode) and `found`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One quantity of one environment, or of the whole dataset (`environment` = WHOLE).

    Attributes:
        check: The check that it belongs to.
        environment: The environment's name.
        value: The number; None where the data holds nothing to measure it on.
        message: What was found, in words, with an example where something is wrong.
    """

    check: str
    environment: str
    value: float | None
    message: str


def rows(relation: duckdb.DuckDBPyRelation) -> list[dict[str, Any]]:
    """Return the rows of a small result."""
    result: list[dict[str, Any]] = relation.to_arrow_table().to_pylist()
    return result


def environments(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the names of the environments, sorted."""
    found = rows(connection.sql("SELECT DISTINCT environment FROM episodes ORDER BY environment"))
    return [row["environment"] for row in found]


def offences(
    check: str, names: Sequence[str], relation: duckdb.DuckDBPyRelation, *, unit: str = "rows", sound: str = "none"
) -> list[Measure]:
    """Return per environment the number of offending rows.

    Args:
        check: The check.
        names: Every environment; one that has no offence counts 0.
        relation: One row per offence, as `Offences` returns them.
        unit: What is counted, for the message.
        sound: The message where nothing is wrong.
    """
    example = "min(concat('episode ', episode_id, ' step ' || step, ': ', found))"
    grouped = relation.aggregate(f"environment, count(*) AS n, {example} AS example")
    found = {row["environment"]: row for row in rows(grouped)}
    unknown = sorted(set(found) - set(names))
    out = []
    for name in [*names, *unknown]:
        row = found.get(name)
        message = f"{row['n']} {unit}; for example {row['example']}" if row else sound
        out.append(Measure(check=check, environment=name, value=float(row["n"]) if row else 0.0, message=message))
    return out
