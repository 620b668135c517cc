"""Compaction: the many small files of a table's partition become few, and nothing that anyone reads changes.

New files are written and sorted first; one commit then puts them in the place of the old ones. A commit that adds rows
meanwhile is untouched by it, another compaction makes it start over. The old files stay where they are, sealed versions
go on reading them; what nothing names any more is `vacuum`'s.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from esper.karn import delta
from esper.karn.places import Place, fetch_all
from esper.karn.store import Dataset
from esper.karn.tables import PARTITION_COLUMN, sort_rows, storage_schema
from esper.leyline.errors import StoreError
from esper.leyline.schema import SCHEMAS

TARGET_BYTES = 32 * 2**20
"""Bytes of the files that compaction makes, about; sorted one at a time in memory."""

APP_ID = "esper-compaction"
"""Two compactions of the same files would both add their rows: the transaction of the second is refused."""

TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What compaction did to one table: files and bytes that the table named before and names now."""

    table: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    wall_s: float


def compact(dataset: Dataset, *, target_bytes: int = TARGET_BYTES) -> list[Compacted]:
    """Rewrite the current tables' small files into few, rows sorted within each.

    A partition is rewritten where it has at least two files below half the target, and those alone.

    Args:
        dataset: Whose tables.
        target_bytes: Bytes of a file, about, 1 or more.

    Raises:
        StoreError: Nothing was committed, the store cannot be written, or other compactions were always faster.
        IntegrityError: A file of the tables is damaged.
    """
    return [_compact_table(dataset, table, target_bytes) for table in SCHEMAS]


def _compact_table(dataset: Dataset, table: str, target_bytes: int) -> Compacted:
    start = time.perf_counter()
    where = dataset.place.child(table)
    if not delta.exists(where):
        raise StoreError(f"{dataset.place.show()} has no table {table!r}\n  nothing was committed to this dataset yet")
    with delta.delta_errors(where):
        before = _files(delta.open_table(where))
        partitions = sorted({file.partition for file in before})
    for partition in partitions:
        _compact_partition(where, table, partition, target_bytes)
    with delta.delta_errors(where):
        after = _files(delta.open_table(where))
    return Compacted(
        table=table,
        files_before=len(before),
        files_after=len(after),
        bytes_before=sum(file.size for file in before),
        bytes_after=sum(file.size for file in after),
        wall_s=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True)
class _File:
    """A file that a table names; `path` is relative to the table, as it lies there."""

    path: str
    partition: str
    size: int
    low_seed: int


def _files(opened: DeltaTable) -> list[_File]:
    """The files in order of environment seed."""
    actions = pa.table(opened.get_add_actions(flatten=True)).to_pylist()
    files = [
        _File(
            unquote(row["path"]), row[f"partition.{PARTITION_COLUMN}"], row["size_bytes"], row.get("min.env_seed") or 0
        )
        for row in actions
    ]
    return sorted(files, key=lambda file: (file.partition, file.low_seed, file.path))


def _compact_partition(where: Place, table: str, partition: str, target_bytes: int) -> None:
    for attempt in range(TRIES):
        with delta.delta_errors(where):
            opened = delta.open_table(where)
            small = [f for f in _files(opened) if f.partition == partition and 2 * f.size < target_bytes]
            if len(small) < 2:
                return
            try:
                _replace(where, table, opened, small, target_bytes)
            except CommitFailedError:
                time.sleep(0.05 * (attempt + 1))
            else:
                return
    raise StoreError(f"cannot compact {where.show()}: other compactions won {TRIES} times; run it again")


def _replace(where: Place, table: str, opened: DeltaTable, small: Sequence[_File], target_bytes: int) -> None:
    """Write the rows of small files as few, and commit the exchange."""
    added: list[AddAction] = []
    columns = [field.name for field in opened.schema().fields]
    with tempfile.TemporaryDirectory(prefix="esper-compact-") as folder:
        for index, group in enumerate(_groups(small, target_bytes)):
            staging = Path(folder) / str(index)
            for action in stage_files(table, _rows(where, table, columns, group), staging):
                name = unquote(action["path"])
                where.restore(name, staging / name)
                added.append(
                    AddAction(
                        name,
                        action["size"],
                        action["partitionValues"],
                        action["modificationTime"],
                        False,
                        action["stats"],
                    )
                )
    now_ms = time.time_ns() // 1_000_000
    removed = [RemoveAction(f.path, False, now_ms, f.size, {PARTITION_COLUMN: f.partition}) for f in small]
    version = (opened.transaction_version(APP_ID) or 0) + 1
    properties = CommitProperties(
        app_transactions=[Transaction(APP_ID, version)], max_commit_retries=delta.COMMIT_RETRIES
    )
    try:
        opened.create_write_transaction(
            [*removed, *added], "append", opened.schema(), [PARTITION_COLUMN], commit_properties=properties
        )
    except CommitFailedError:
        for action in added:
            where.remove(action.path)
        raise


def _groups(small: Sequence[_File], target_bytes: int) -> Iterator[list[_File]]:
    """Neighbours by environment seed, about `target_bytes` together; files of one seed stay together."""
    group: list[_File] = []
    for file in small:
        full = sum(member.size for member in group) >= target_bytes
        if group and full and file.low_seed != group[-1].low_seed:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _rows(where: Place, table: str, columns: Sequence[str], group: Sequence[_File]) -> pa.Table:
    """The rows of some files in storage types, sorted; columns that a file is too old for are null."""
    paths = fetch_all(where, [(file.path, file.size, None) for file in group])
    return sort_rows(read_files(table, paths, [file.partition for file in group]).select(columns))


def read_files(table: str, paths: Sequence[Path], partitions: Sequence[str]) -> pa.Table:
    """Return the rows of Parquet files of a table in storage types, the partition column filled in."""
    schema = storage_schema(table)
    parts = []
    for path, partition in zip(paths, partitions, strict=True):
        found = pq.read_table(path, partitioning=None)
        there = set(found.column_names)
        filled: dict[str, Any] = {
            name: found[name] if name in there else pa.nulls(len(found), schema.field(name).type)
            for name in schema.names
        }
        filled[PARTITION_COLUMN] = pa.array([partition] * len(found), pa.string())
        parts.append(pa.table(filled).cast(schema))
    return pa.concat_tables(parts).combine_chunks()


def stage_files(table: str, rows: pa.Table, folder: Path) -> list[dict[str, Any]]:
    """Write rows into a Delta table of their own with the store's writer; return its add actions.

    The same rows give the same bytes. The paths are relative to `folder`, percent-encoded as in a log.
    """
    opened = DeltaTable.create(str(folder), rows.schema, partition_by=[PARTITION_COLUMN])
    write_deltalake(
        opened,
        rows,
        mode="append",
        partition_by=[PARTITION_COLUMN],
        writer_properties=delta.writer_properties(table),
    )
    lines = (folder / "_delta_log" / f"{1:020d}.json").read_text(encoding="utf-8").splitlines()
    return [line["add"] for line in map(json.loads, lines) if "add" in line]
