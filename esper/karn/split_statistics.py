"""Statistics per split of a sealed version: what is in it, what its episodes return, what their features look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from esper.karn.catalogue import query
from esper.karn.splits_stored import PARTS, StoredSplit
from esper.leyline.actions import Op
from esper.leyline.errors import SpecError
from esper.leyline.identity import Role
from esper.leyline.observations import FEATURES
from esper.leyline.rewards import RewardSpec

if TYPE_CHECKING:
    from esper.karn.versions import Version

TIMEOUT_S = 600.0
ALL = "(all)"
"""Stands for every environment in a row of `split_statistics`."""

NO_SPLIT = "(none)"
"""Rows of a held-out environment whose environment seed is no test seed."""

OP_SHARES = tuple(f"share_{op.name.lower()}" for op in Op)


def split_statistics(version: Version, split: StoredSplit) -> pa.Table:
    """Return one row per split and environment, and per split over all of them.

    Columns: split, environment, episodes, failed, control_invalid, decisions, env_seeds, distinct_histories,
    return_mean and return_sd (of the reward in the version's provenance, over episodes that have one; null without),
    and the share of each op among the decisions that were not forced.

    Raises:
        IntegrityError: A file of the version is missing or damaged.
    """
    rewards = _rewards(version)
    cases = " ".join(
        f"WHEN {_text(name)} THEN (points - {reward.rent_points!r} * growth) / {reward.scale_points!r}"
        for name, reward in sorted(rewards.items())
    )
    value = f"CASE environment {cases} END" if cases else "NULL::DOUBLE"
    counts = ", ".join(
        f"count(*) FILTER (NOT forced AND NOT replayed AND op = '{op.name}') AS num_{op.name}" for op in Op
    )
    shares = ", ".join(f"sum(num_{op.name}) / nullif(sum(free), 0) AS {name}" for op, name in zip(Op, OP_SHARES))
    sql = f"""
    WITH of_steps AS (
        SELECT episode_id, sum(reward_accuracy_points) AS points, sum(reward_growth_log2) AS growth,
            count(*) FILTER (NOT replayed) AS decisions, count(*) FILTER (NOT forced AND NOT replayed) AS free, {counts}
        FROM steps WHERE NOT is_last GROUP BY episode_id
    ), of_episodes AS (
        SELECT *, {_part(split)} AS split,
            CASE WHEN control_valid AND outcome <> 'failed' THEN {value} END AS total
        FROM episodes LEFT JOIN of_steps USING (episode_id) WHERE role = '{Role.DATA.value}'
    )
    SELECT split, coalesce(environment, '{ALL}') AS environment, count(*) AS episodes,
        count(*) FILTER (outcome = 'failed') AS failed, count(*) FILTER (NOT control_valid) AS control_invalid,
        coalesce(sum(decisions), 0)::BIGINT AS decisions, count(DISTINCT env_seed) AS env_seeds,
        count(DISTINCT (env_seed, history_id)) AS distinct_histories,
        avg(total) AS return_mean, stddev_samp(total) AS return_sd, {shares}
    FROM of_episodes GROUP BY GROUPING SETS ((split, environment), (split))
    ORDER BY list_position([{_names()}], split), environment
    """  # noqa: S608
    return query(version, sql, timeout_s=TIMEOUT_S)


def feature_statistics(version: Version, split: StoredSplit) -> pa.Table:
    """Return one row per split and observed feature: unit, rows, the share that is missing, mean, sd, min, max.

    Rows are observations before a decision, replayed ones left out; a column that is missing everywhere is left out.
    """
    units = {column: feature.unit for feature in FEATURES for column in feature.columns}
    aggregates = ", ".join(
        f"{{'present': count({name}), 'mean': avg({name}), 'sd': stddev_samp({name}), "
        f"'low': min({name})::DOUBLE, 'high': max({name})::DOUBLE}} AS {name}"
        for name in units
    )
    sql = f"""
    SELECT {_part(split)} AS split, count(*) AS num_rows, {aggregates} FROM steps
    WHERE role = '{Role.DATA.value}' AND NOT is_last AND NOT replayed
    GROUP BY split ORDER BY list_position([{_names()}], split)
    """  # noqa: S608
    rows = []
    for found in query(version, sql, timeout_s=TIMEOUT_S).to_pylist():
        for name, unit in units.items():
            moments = found[name]
            rows.append(
                {
                    "split": found["split"],
                    "feature": name,
                    "unit": unit,
                    "rows": found["num_rows"],
                    "missing_share": 1 - moments["present"] / found["num_rows"],
                    **{key: moments[key] for key in ("mean", "sd", "low", "high")},
                }
            )
    measured = {row["feature"] for row in rows if row["missing_share"] < 1}
    return pa.Table.from_pylist([row for row in rows if row["feature"] in measured], schema=_FEATURE_SCHEMA)


_FEATURE_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("split", "feature", "unit")),
        pa.field("rows", pa.int64()),
        *(pa.field(name, pa.float64()) for name in ("missing_share", "mean", "sd", "low", "high")),
    ]
)


def _rewards(version: Version) -> dict[str, RewardSpec]:
    """The reward of each environment, as far as the version's provenance has them."""
    found = version.manifest.provenance.get("rewards")
    named = found.items() if isinstance(found, dict) else ()
    rewards = {}
    for name, data in named:
        if not isinstance(data, dict):
            raise SpecError(f"{version.location}: rewards.{name} is {data!r}\n  expected: a reward's fields")
        rewards[name] = RewardSpec.parse(data, f"{version.location}: rewards.{name}")
    return rewards


def _part(split: StoredSplit) -> str:
    """SQL that tells the split of a row from its environment and environment seed."""
    held = ", ".join(_text(name) for name in split.spec.held_out_environments)
    learned = f" AND environment NOT IN ({held})" if held else ""
    cases = [
        f"WHEN env_seed IN ({_list(split.seeds(part))}){'' if part == 'test' else learned} THEN '{part}'"
        for part in PARTS
        if split.seeds(part)
    ]
    return f"CASE {' '.join(cases)} ELSE '{NO_SPLIT}' END" if cases else f"'{NO_SPLIT}'"


def _names() -> str:
    return ", ".join(f"'{name}'" for name in (*PARTS, NO_SPLIT))


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _text(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
