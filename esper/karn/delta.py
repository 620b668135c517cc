"""The Delta Lake side of the store: tables that exist once, appends that happen once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from esper.karn.places import Place, as_place, fetch_all
from esper.karn.store_errors import explained, store_error
from esper.karn.tables import PARTITION_COLUMN, storage_schema
from esper.leyline.errors import IntegrityError, SchemaError, StoreError
from esper.leyline.schema import SCHEMA_VERSION, SCHEMAS

LOG = "_delta_log"
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
def delta_errors(where: Place | Path | str) -> Iterator[None]:
    """Turn what Delta Lake and the file system raise into an EsperError that names the path."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise IntegrityError(f"a file of the table at {_shown(where)} is damaged: {explained(error)}") from None
    except (DeltaError, OSError) as error:
        raise store_error(
            _shown(where),
            error,
            "check that the folder exists, is writable and has space, or choose another with --store",
        ) from None


def _shown(where: Place | Path | str) -> str:
    return str(where) if isinstance(where, Path | str) else where.show()


def exists(where: Place) -> bool:
    """Return whether a Delta table is there."""
    if where.storage_options is not None:  # Delta Lake would ask the network with Python's lock held
        return any(name.endswith((".json", ".parquet")) for name in where.names(LOG))
    return (where.mirror / LOG).is_dir() and bool(DeltaTable.is_deltatable(str(where.mirror)))


def open_table(where: Place) -> DeltaTable:
    """Return the table at a place as it is now (DeltaError, OSError where it cannot be)."""
    return DeltaTable(where.url, storage_options=where.storage_options)


def opened(where: Place) -> DeltaTable | None:
    """Return the table at a place as it is now, None where there is none (DeltaError, OSError as `open_table`)."""
    if where.storage_options is None and not exists(where):
        return None
    try:  # on an object store each question costs a round trip: the one for the table answers this one too
        return open_table(where)
    except TableNotFoundError:
        return None


def create(where: Place, table: str) -> DeltaTable:
    """Return the table, made now unless it exists; any number of processes may do this at once."""
    last: DeltaError | None = None
    with delta_errors(where):
        if where.storage_options is None:
            where.mirror.mkdir(parents=True, exist_ok=True)
        for attempt in range(CREATE_TRIES):
            current = opened(where)
            if current is not None:
                check_columns(where, current, table)
                return current
            try:
                return DeltaTable.create(
                    where.url,
                    storage_schema(table),
                    mode="ignore",
                    partition_by=[PARTITION_COLUMN],
                    configuration={"delta.checkpointInterval": CHECKPOINT_COMMITS},
                    storage_options=where.storage_options,
                )
            except DeltaError as error:
                last = error
                time.sleep(0.05 * (attempt + 1))
    raise StoreError(f"cannot create the table at {where.show()}: {explained(str(last))}")


def check_columns(where: Place, current: DeltaTable, table: str) -> None:
    """Raise SchemaError where a table has columns that this code does not know: a newer Esper wrote them."""
    unknown = sorted({field.name for field in current.schema().fields} - set(SCHEMAS[table].names))
    if unknown:
        raise SchemaError(
            f"the table {table!r} at {where.show()} has the column {unknown[0]!r}\n"
            f"  expected: those of schema version {SCHEMA_VERSION}; update esper, a newer version of it wrote this one"
        )


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


def read_current(
    where: Place | Path, table: str, columns: Sequence[str], env_seeds: Sequence[int] | None = None
) -> pa.Table:
    """Return columns of what a table holds now; only files that may hold one of `env_seeds` are read.

    The files are read by path, remote ones in the mirror: Delta Lake's own file system calls Python from pyarrow's
    threads, which aborts the process when it ends at that moment.
    """
    where = as_place(where)
    schema = pa.schema([storage_schema(table).field(column) for column in columns])
    parts = [schema.empty_table()]
    with delta_errors(where):
        current = opened(where)
        if current is None:
            return schema.empty_table()
        actions = pa.table(current.get_add_actions(flatten=True)).to_pylist()
        near = [action for action in actions if _near(action, env_seeds)]
        wanted = [(unquote(action["path"]), action["size_bytes"], None) for action in near]
        for path in fetch_all(where, wanted):
            parts.append(pq.read_table(path, columns=list(columns), partitioning=None).cast(schema))
    return pa.concat_tables(parts)


def _near(action: Mapping[str, Any], env_seeds: Sequence[int] | None) -> bool:
    """Whether a file may hold rows of one of the seeds."""
    low, high = action.get("min.env_seed"), action.get("max.env_seed")
    if env_seeds is None or low is None or high is None:
        return True
    return any(low <= seed <= high for seed in env_seeds)


def current_files(where: Place | Path) -> dict[str, tuple[int, list[str]]]:
    """Return per table of a dataset its version and its files relative to the dataset.

    `episodes` is read first and was written last, so whatever it names is in the other two.
    """
    where = as_place(where)
    found = {}
    for table in reversed(SCHEMAS):
        part = where.child(table)
        with delta_errors(part):
            current = opened(part)
            if current is None:
                raise StoreError(f"{where.show()} has no table {table!r}\n  nothing was committed to this dataset yet")
            names = current.get_add_actions(flatten=True)
        check_columns(part, current, table)
        paths = pa.table(names)["path"].to_pylist()
        found[table] = (int(current.version()), sorted(f"{table}/{unquote(name)}" for name in paths))
    return found
