"""What differs between two sealed versions: episodes, cells, provenance. DuckDB compares the rows; none is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from esper.karn.catalogue import query
from esper.leyline.schema import deterministic_columns

if TYPE_CHECKING:
    from pydantic import JsonValue

    from esper.karn.manifest import VersionManifest
    from esper.karn.versions import Version

TIMEOUT_S = 3600.0
CELL = ("environment", "role", "root", "controller", "epsilon")

EPISODES = pa.schema(
    [
        pa.field("episode_id", pa.string()),
        pa.field("change", pa.string()),
        pa.field("differs_in", pa.string()),
        *(pa.field(name, pa.float64() if name == "epsilon" else pa.string()) for name in CELL),
        pa.field("env_seed", pa.int64()),
    ]
)
"""`change` is added, removed or changed; `differs_in` is episodes, steps or both where the rows of one id differ."""

CELLS = pa.schema(
    [
        *(pa.field(name, pa.float64() if name == "epsilon" else pa.string()) for name in CELL),
        *(pa.field(name, pa.int64()) for name in ("before", "after", "added", "removed", "changed")),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is different in `new` against `old`.

    Attributes:
        facts: Name, old and new value of what the manifests say: schema version, matrix, digest, counts.
        provenance: Dotted key, old and new value (None: it is not there) of what the provenance says.
        episodes: EPISODES: those that were added or removed, or whose rows differ.
        cells: CELLS: those with any difference.
    """

    facts: list[tuple[str, str, str]]
    provenance: list[tuple[str, str | None, str | None]]
    episodes: pa.Table
    cells: pa.Table

    def num_episodes(self, change: str) -> int:
        """Return how many episodes were added, removed or changed."""
        return int(pc.sum(pc.equal(self.episodes["change"], change)).as_py() or 0)


def diff(old: Version, new: Version) -> Difference:
    """Return what differs between two versions, of one dataset or of two.

    Rows are compared by the columns that the digest covers, under the older of the two schemas: times, code commits and
    attempts are no difference.

    Raises:
        IntegrityError: A file of either version is missing or damaged.
    """
    schema_version = min(old.manifest.schema_version, new.manifest.schema_version)
    before, after = (_episodes(version, schema_version) for version in (old, new))
    joined = before.join(after, "episode_id", join_type="full outer", left_suffix="", right_suffix="_new")
    return Difference(
        facts=_facts(old, new),
        provenance=_provenance(old.manifest.provenance, new.manifest.provenance),
        episodes=_changes(joined),
        cells=_cells(joined),
    )


def _episodes(version: Version, schema_version: int) -> pa.Table:
    """One row per episode: its cell, and a hash of its rows in either table."""
    episodes, steps = (_columns(deterministic_columns(table, schema_version)) for table in ("episodes", "steps"))
    sql = f"""
    WITH hashed AS (SELECT episode_id, hash({steps}) AS row_hash FROM steps),
    of_steps AS (
        SELECT episode_id, count(*) AS num_rows, bit_xor(row_hash) AS all_rows, sum(row_hash % 4294967291) AS row_sum
        FROM hashed GROUP BY episode_id
    )
    SELECT episode_id, {_columns(CELL)}, env_seed, hash({episodes}) AS episode_hash,
        hash(coalesce(num_rows, 0), all_rows, row_sum) AS steps_hash
    FROM episodes LEFT JOIN of_steps USING (episode_id)
    """  # noqa: S608
    return query(version, sql, timeout_s=TIMEOUT_S)


def _columns(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _changes(joined: pa.Table) -> pa.Table:
    """EPISODES of what is not the same on both sides, in the order of cell and id."""
    is_old, is_new = pc.is_valid(joined["episode_hash"]), pc.is_valid(joined["episode_hash_new"])
    differs = [_differs(joined, name) for name in ("episode_hash", "steps_hash")]
    change = pc.case_when(
        pc.make_struct(pc.invert(is_old), pc.invert(is_new), pc.or_(*differs)), "added", "removed", "changed"
    )
    where = pc.case_when(
        pc.make_struct(pc.and_(*differs), differs[0], differs[1]), "episodes and steps", "episodes", "steps"
    )
    columns = {name: _either(joined, name) for name in (*CELL, "env_seed")}
    table = pa.table({"episode_id": joined["episode_id"], "change": change, "differs_in": where, **columns})
    table = table.filter(pc.is_valid(table["change"])).cast(EPISODES)
    return table.sort_by([(name, "ascending") for name in ("change", *CELL, "episode_id")])


def _differs(joined: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.not_equal(joined[name], joined[f"{name}_new"]), False)


def _either(joined: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.coalesce(joined[f"{name}_new"], joined[name])


def _cells(joined: pa.Table) -> pa.Table:
    is_old, is_new = pc.is_valid(joined["episode_hash"]), pc.is_valid(joined["episode_hash_new"])
    flags = {
        "before": is_old,
        "after": is_new,
        "added": pc.invert(is_old),
        "removed": pc.invert(is_new),
        "changed": pc.or_(_differs(joined, "episode_hash"), _differs(joined, "steps_hash")),
    }
    table = pa.table(
        {name: _either(joined, name) for name in CELL} | {name: flag.cast(pa.int64()) for name, flag in flags.items()}
    )
    counted = table.group_by(list(CELL), use_threads=False).aggregate([(name, "sum") for name in flags])
    counted = counted.rename_columns([*CELL, *flags]) if counted.column_names[0] == CELL[0] else counted
    changed = pc.greater(pc.add(pc.add(counted["added"], counted["removed"]), counted["changed"]), 0)
    return counted.filter(changed).select(CELLS.names).cast(CELLS).sort_by([(name, "ascending") for name in CELL])


def _facts(old: Version, new: Version) -> list[tuple[str, str, str]]:
    before, after = old.manifest, new.manifest
    facts = [
        ("digest", before.digest, after.digest),
        ("schema version", str(before.schema_version), str(after.schema_version)),
        ("matrix", before.matrix_id, after.matrix_id),
        ("sealed", before.created_at, after.created_at),
        ("code commits", ", ".join(before.code_commits), ", ".join(after.code_commits)),
        ("files", f"{len(before.files):,}", f"{len(after.files):,}"),
        ("bytes", _bytes(before), _bytes(after)),
    ]
    counts = [
        (name.replace("_", " "), f"{before.counts.get(name, 0):,}", f"{after.counts.get(name, 0):,}")
        for name in {**before.counts, **after.counts}
    ]
    return [fact for fact in (*facts, *counts) if fact[1] != fact[2]]


def _bytes(manifest: VersionManifest) -> str:
    return f"{sum(entry.size for entry in manifest.files):,}"


def _provenance(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[tuple[str, str | None, str | None]]:
    before, after = _flat(dict(old)), _flat(dict(new))
    keys = sorted({*before, *after})
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flat(value: JsonValue, path: str = "") -> dict[str, str]:
    """Dotted key and JSON of everything in nested tables; lists of tables by position."""
    items: dict[str, JsonValue] = {}
    if isinstance(value, dict):
        items = value
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = {str(index): item for index, item in enumerate(value)}
    if not items:
        return {path: value if isinstance(value, str) else json.dumps(value, sort_keys=True)} if path else {}
    found: dict[str, str] = {}
    for key, item in items.items():
        found |= _flat(item, f"{path}.{key}" if path else key)
    return found
