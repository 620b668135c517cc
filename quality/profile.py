"""Least value, greatest value and number of values of every numeric column, in one pass over the rows.

NaN is greater than every number in DuckDB's order, so the two extremes also tell whether a column is finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from esper.leyline.schema import STEPS
from quality.measures import rows

Range = tuple[float | None, float | None, int]
"""Least, greatest and how many are not null."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges by (environment, whether the rows are sound rows of training roles) and column, and the rows' number."""

    ranges: Mapping[tuple[str, bool], Mapping[str, Range]]
    totals: Mapping[tuple[str, bool], int]

    def extremes(self, environment: str, column: str) -> tuple[float | None, float | None]:
        """Return the least and the greatest finite bound of a column over all rows of an environment."""
        found = [ranges[column] for (name, _), ranges in self.ranges.items() if name == environment]
        least = [low for low, _, _ in found if low is not None and math.isfinite(low)]
        most = [high for _, high, _ in found if high is not None and math.isfinite(high)]
        return min(least, default=None), max(most, default=None)

    def not_finite(self, columns: Sequence[str]) -> list[str]:
        """Return those columns that hold a NaN or an infinity somewhere."""
        return [
            column
            for column in columns
            if any(
                bound is not None and not math.isfinite(bound)
                for ranges in self.ranges.values()
                for bound in ranges[column][:2]
            )
        ]

    def training(self, environment: str) -> tuple[Mapping[str, Range], int]:
        """Return the ranges and the number of the sound rows of training roles."""
        return self.ranges.get((environment, True), {}), self.totals.get((environment, True), 0)


def numeric_columns() -> list[str]:
    """Return the integer and floating-point columns of `steps`, commit columns apart."""
    kinds = (pa.types.is_floating, pa.types.is_integer)
    return [item.name for item in STEPS if item.name != "attempt" and any(kind(item.type) for kind in kinds)]


def take_profile(connection: duckdb.DuckDBPyConnection) -> Profile:
    """Return the profile of `steps`; the working tables must be there."""
    columns = numeric_columns()
    parts = [f"min({name}) AS low_{name}, max({name}) AS high_{name}, count({name}) AS n_{name}" for name in columns]
    relation = connection.sql(
        "SELECT s.*, coalesce(e.sound, false) AND s.role IN ('data', 'online') AS training "
        "FROM steps AS s LEFT JOIN (SELECT DISTINCT episode_id, sound FROM health_episodes) AS e USING (episode_id)"
    )
    found = rows(relation.aggregate(f"environment, training, count(*) AS total, {', '.join(parts)}"))
    ranges, totals = {}, {}
    for row in found:
        key = (row["environment"], row["training"])
        totals[key] = row["total"]
        ranges[key] = {
            name: (_float(row[f"low_{name}"]), _float(row[f"high_{name}"]), row[f"n_{name}"]) for name in columns
        }
    return Profile(ranges, totals)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
