"""What must not be there twice, must not cross a split, and must not be constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import numpy as np

from esper.leyline.identity import EVALUATION_START, SELECTION_START
from esper.leyline.observations import FEATURES, slot_column
from esper.leyline.schema import schema_version_of
from quality.coverage import environment_specs
from quality.measures import WHOLE, Measure, offences, rows
from quality.profile import Profile, Range

_DOUBLED = """
SELECT environment, episode_id, NULL::INTEGER AS step, concat(copies, ' rows in episodes, ', coalesce(num_rows, 0),
    ' in steps for ', coalesce(num_keys, 0), ' keys') AS found
FROM health_episodes WHERE doubled
"""

_SPLIT = "CASE WHEN role IN ('data', 'online') THEN 'training' ELSE role END"

_STATIC = frozenset(
    (
        *("horizon", "learning_rate", "base_learning_rate", "optimiser", "batch_size", "batches_per_epoch"),
        *("host_params", "host_depth", "num_slots", "max_seeds", "max_fossils", "param_budget"),
        *("present", "resolution", "channels", "kernel", "pool", "narrowed", "frozen", "last_executed"),
        *("num_rollbacks", "interaction_sum"),
    )
)
"""Constant by design: what describes the environment; `last_executed`, which stays 1 where no gate refuses;
`num_rollbacks`, 0 where every host stays sound; `interaction_sum`, which only environments that ask for it measure."""


_MISPLACED = (
    f"CASE split WHEN 'training' THEN replicate >= {SELECTION_START} "
    f"WHEN 'selection' THEN replicate < {SELECTION_START} OR replicate >= {EVALUATION_START} "
    f"ELSE replicate < {EVALUATION_START} END"
)


def doubled(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the episodes that are there twice."""
    return connection.sql(_DOUBLED)


def _seeds(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the env_seeds that lie in two splits, or in one that does not own their replicate."""
    by_seed = (
        connection.table("episodes")
        .project(f"env_seed, replicate, {_SPLIT} AS split")
        .aggregate(
            "env_seed, count(DISTINCT split) AS splits, string_agg(DISTINCT split, ', ' ORDER BY split) AS names, "
            f"bool_or({_MISPLACED}) AS misplaced",
            "env_seed",
        )
    )
    return by_seed.filter("splits > 1 OR misplaced")


def leaked(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the episodes of the env_seeds that lie in two splits or in a wrong one."""
    episodes = connection.table("episodes").set_alias("e").join(_seeds(connection).set_alias("l"), "env_seed")
    told = "concat('env_seed ', env_seed, ', replicate ', replicate, ', role ', role, ': in ', names) AS found"
    return episodes.project(f"environment, episode_id, NULL::INTEGER AS step, {told}")


def _leaks(connection: duckdb.DuckDBPyConnection) -> list[Measure]:
    found = rows(_seeds(connection).order("env_seed"))
    message = "every env_seed stays in the split that owns its replicate"
    if found:
        message = f"{len(found)} env_seeds; for example {found[0]['env_seed']} in {found[0]['names']}"
    return [Measure(check="seed_split_leak", environment=WHOLE, value=float(len(found)), message=message)]


def _varying_features(used_slots: Sequence[int], schema_version: int) -> list[str]:
    varying = [item for item in FEATURES if item.name not in _STATIC and item.since <= schema_version]
    slots = (slot_column(slot, item.name) for slot in used_slots for item in varying if item.scope == "slot")
    return [*(item.name for item in varying if item.scope == "global"), *slots]


def _recorded_under(parts: Sequence[Mapping[str, Range]]) -> int:
    """The schema version of rows: those of an older one have no value in any feature that came later."""
    valued = {column for ranges in parts for column, (_, _, count) in ranges.items() if count}
    return schema_version_of("steps", valued)


def _constant(profile: Profile, names: Sequence[str], used_slots: Mapping[str, set[int]]) -> list[Measure]:
    """A feature is constant where it has one value, or none, in every row; one that is sometimes null varies."""
    out = []
    for name in (WHOLE, *names):
        of = [profile.training(place) for place in names if name in (WHOLE, place)]
        of = [(ranges, total) for ranges, total in of if total]
        if not of:
            out.append(Measure(check="constant_features", environment=name, value=None, message="no training rows"))
            continue
        recorded = _recorded_under([ranges for ranges, _ in of])
        slots = set().union(*(used_slots[place] for place in names if name in (WHOLE, place)))
        used = _varying_features(sorted(slots), recorded)
        total = sum(total for _, total in of)
        constant = [column for column in used if _never_varies([ranges[column] for ranges, _ in of], total)]
        shown = ", ".join(constant[:8]) + (", ..." if len(constant) > 8 else "")
        message = f"never varies: {shown}" if constant else "every feature varies"
        out.append(Measure(check="constant_features", environment=name, value=float(len(constant)), message=message))
    return out


def _never_varies(ranges: Sequence[Range], total: int) -> bool:
    """Whether the (least, greatest, number of values) of parts of `total` rows leave one value, or none, in all."""
    extremes = {value for least, greatest, _ in ranges for value in (least, greatest) if value is not None}
    known = sum(count for _, _, count in ranges)
    return not extremes or (len(extremes) == 1 and known == total)


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str], profile: Profile) -> list[Measure]:
    """Return `duplicates`, `seed_split_leak` and `constant_features`."""
    once = "every episode is there once"
    specs = environment_specs(connection).items()
    used_slots = {name: set(np.flatnonzero(spec.enabled_slots).tolist()) for name, spec in specs}
    return [
        *offences("duplicates", names, doubled(connection), unit="episodes", sound=once),
        *_leaks(connection),
        *_constant(profile, names, used_slots),
    ]
