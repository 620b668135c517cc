"""The Delta Lake side of the store: tables that exist once, appends that happen once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from esper.karn.tables import PARTITION_COLUMN, storage_schema
from esper.leyline.errors import IntegrityError, StoreError
from esper.leyline.schema import SCHEMAS

CREATE_TRIES = 20
CHECKPOINT_COMMITS = "20"
APPEND_TRIES = 5
COMMIT_RETRIES = 50
ROW_GROUP_ROWS = 65_536


def writer_properties(table: str) -> WriterProperties:
    """Return zstd, without a dictionary for floats: they are byte-stream split instead."""
    floats = ColumnProperties(dictionary_enabled=False, encoding="BYTE_STREAM_SPLIT")
    columns = {field.name: floats for field in storage_schema(table) if pa.types.is_floating(field.type)}
    return WriterProperties(
        compression="ZSTD", compression_level=3, max_row_group_size=ROW_GROUP_ROWS, column_properties=columns
    )


@contextlib.contextmanager
def delta_errors(path: Path | str) -> Iterator[None]:
    """Turn what Delta Lake and the file system raise into an EsperError that names the path."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise IntegrityError(f"a file of the table at {path} is damaged: {str(error).splitlines()[0]}") from None
    except (DeltaError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"cannot use the store at {path}: {reason}\n"
            "  check that the folder exists, is writable and has space, or choose another with --store"
        ) from None


def exists(path: Path) -> bool:
    """Return whether a Delta table is there."""
    return (path / "_delta_log").is_dir() and bool(DeltaTable.is_deltatable(str(path)))


def create(path: Path, table: str) -> DeltaTable:
    """Return the table, made now unless it exists; any number of processes may do this at once."""
    last: DeltaError | None = None
    with delta_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for attempt in range(CREATE_TRIES):
            if exists(path):
                return DeltaTable(path)
            try:
                return DeltaTable.create(
                    path,
                    storage_schema(table),
                    mode="ignore",
                    partition_by=[PARTITION_COLUMN],
                    configuration={"delta.checkpointInterval": CHECKPOINT_COMMITS},
                )
            except DeltaError as error:
                last = error
                time.sleep(0.05 * (attempt + 1))
    raise StoreError(f"cannot create the table at {path}: {last}")


def highest_attempt(table: DeltaTable, commit_id: str) -> int:
    """Return the highest attempt of a commit in the snapshot that `table` holds, 0 where none."""
    return table.transaction_version(commit_id) or 0


def append(table: DeltaTable, name: str, rows: pa.Table, commit_id: str, attempt: int) -> bool:
    """Append rows as one attempt of a commit; return False where another process has already done so.

    Args:
        table: A snapshot, which may be behind; afterwards it is current.
        name: Which of the three tables it is.
        rows: In storage types.
        commit_id: Which commit.
        attempt: Which attempt of it.

    Raises:
        StoreError: The table cannot be written.
    """
    properties = CommitProperties(app_transactions=[Transaction(commit_id, attempt)], max_commit_retries=COMMIT_RETRIES)
    for repeat in range(APPEND_TRIES):
        with delta_errors(table.table_uri):
            if highest_attempt(table, commit_id) >= attempt:
                return False
            try:
                write_deltalake(
                    table,
                    rows,
                    mode="append",
                    # A table that an older schema made gains the columns that came later; its own rows have null there.
                    schema_mode="merge" if _lacks_columns(table, rows) else None,
                    partition_by=[PARTITION_COLUMN],
                    writer_properties=writer_properties(name),
                    commit_properties=properties,
                )
            except CommitFailedError:
                time.sleep(0.05 * (repeat + 1))
                table.update_incremental()
            else:
                return True
    raise StoreError(f"cannot append to {table.table_uri}: other processes won {APPEND_TRIES} times; run it again")


def _lacks_columns(table: DeltaTable, rows: pa.Table) -> bool:
    return not set(rows.column_names) <= {field.name for field in table.schema().fields}


def read_current(path: Path, table: str, columns: Sequence[str], env_seeds: Sequence[int] | None = None) -> pa.Table:
    """Return columns of what a table holds now; only files that may hold one of `env_seeds` are read.

    The files are read by path: Delta Lake's own file system calls Python from pyarrow's threads, which aborts the
    process when it ends at that moment.
    """
    schema = pa.schema([storage_schema(table).field(column) for column in columns])
    if not exists(path):
        return schema.empty_table()
    with delta_errors(path):
        actions = pa.table(DeltaTable(path).get_add_actions(flatten=True)).to_pylist()
        parts = [schema.empty_table()]
        for action in actions:
            low, high = action.get("min.env_seed"), action.get("max.env_seed")
            known = env_seeds is not None and low is not None and high is not None
            if known and not any(low <= seed <= high for seed in env_seeds or ()):
                continue
            rows = pq.read_table(path / unquote(action["path"]), columns=list(columns), partitioning=None)
            parts.append(rows.cast(schema))
    return pa.concat_tables(parts)


def current_files(root: Path) -> dict[str, tuple[int, list[str]]]:
    """Return per table its version and its files relative to `root`.

    `episodes` is read first and was written last, so whatever it names is in the other two.
    """
    found = {}
    for table in reversed(SCHEMAS):
        path = root / table
        if not exists(path):
            raise StoreError(f"{root} has no table {table!r}\n  nothing was committed to this dataset yet")
        with delta_errors(path):
            current = DeltaTable(path)
            names = current.get_add_actions(flatten=True)
        paths = pa.table(names)["path"].to_pylist()
        found[table] = (int(current.version()), sorted(f"{table}/{unquote(name)}" for name in paths))
    return found
