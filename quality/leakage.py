"""What must not be there twice, must not cross a split, and must not be constant."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.identity import EVALUATION_START, SELECTION_START
from esper.leyline.observations import GLOBAL_FEATURES, SLOT_FEATURES, slot_column
from quality.measures import WHOLE, Measure, offences, rows

_DOUBLED = """
SELECT environment, concat('episode ', episode_id, ': ', copies, ' rows in episodes, ', coalesce(num_rows, 0),
    ' in steps for ', coalesce(num_keys, 0), ' keys') AS example
FROM health_episodes WHERE doubled
"""

_SPLIT = "CASE WHEN role IN ('data', 'online') THEN 'training' ELSE role END"

_STATIC = frozenset(
    (
        *("horizon", "learning_rate", "base_learning_rate", "optimiser", "batch_size", "batches_per_epoch"),
        *("host_params", "host_depth", "num_slots", "max_seeds", "max_fossils", "param_budget"),
        *("present", "resolution", "channels", "kernel", "pool", "narrowed", "frozen", "last_executed"),
    )
)
"""Constant by design: what describes the environment, and `last_executed`, which stays 1 where no gate refuses."""


def _leaks(connection: duckdb.DuckDBPyConnection) -> list[Measure]:
    episodes = connection.table("episodes").project(f"env_seed, replicate, {_SPLIT} AS split")
    by_seed = episodes.aggregate(
        "env_seed, count(DISTINCT split) AS splits, string_agg(DISTINCT split, ', ' ORDER BY split) AS names, "
        f"bool_or(CASE split WHEN 'training' THEN replicate >= {SELECTION_START} "
        f"WHEN 'selection' THEN replicate < {SELECTION_START} OR replicate >= {EVALUATION_START} "
        f"ELSE replicate < {EVALUATION_START} END) AS misplaced",
        "env_seed",
    )
    found = rows(by_seed.filter("splits > 1 OR misplaced").order("env_seed"))
    message = "every env_seed stays in the split that owns its replicate"
    if found:
        message = f"{len(found)} env_seeds; for example {found[0]['env_seed']} in {found[0]['names']}"
    return [Measure(check="seed_split_leak", environment=WHOLE, value=float(len(found)), message=message)]


def _varying_features(num_slots: int) -> list[str]:
    slots = (
        slot_column(slot, item.name) for slot in range(num_slots) for item in SLOT_FEATURES if item.name not in _STATIC
    )
    return [*(item.name for item in GLOBAL_FEATURES if item.name not in _STATIC), *slots]


def _constant(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """A feature is constant where it has one value, or none, in every row; one that is sometimes null varies."""
    training = connection.table("health_rows").filter("role IN ('data', 'online')")
    columns = _varying_features(MAX_SLOTS)
    parts = [f"[min({name})::DOUBLE, max({name})::DOUBLE, count({name})::DOUBLE] AS {name}" for name in columns]
    found = rows(training.aggregate("environment, count(*) AS n, max(num_slots) AS slots, " + ", ".join(parts)))
    out = []
    for name in (WHOLE, *names):
        of = [row for row in found if name in (WHOLE, row["environment"])]
        if not of:
            out.append(Measure(check="constant_features", environment=name, value=None, message="no training rows"))
            continue
        used = _varying_features(max(row["slots"] for row in of))
        constant = [column for column in used if _never_varies([row[column] for row in of], sum(r["n"] for r in of))]
        shown = ", ".join(constant[:8]) + (", ..." if len(constant) > 8 else "")
        message = f"never varies: {shown}" if constant else "every feature varies"
        out.append(Measure(check="constant_features", environment=name, value=float(len(constant)), message=message))
    return out


def _never_varies(ranges: Sequence[Sequence[float | None]], total: int) -> bool:
    """Whether the (least, greatest, number of values) of parts of `total` rows leave one value, or none, in all."""
    extremes = {value for least, greatest, _ in ranges for value in (least, greatest) if value is not None}
    known = sum(count or 0 for _, _, count in ranges)
    return not extremes or (len(extremes) == 1 and known == total)


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `duplicates`, `seed_split_leak` and `constant_features`."""
    doubled = connection.sql(_DOUBLED)
    return [
        *offences("duplicates", names, doubled, unit="episodes", sound="every episode is there once"),
        *_leaks(connection),
        *_constant(connection, names),
    ]
