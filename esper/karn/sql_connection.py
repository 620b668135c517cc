"""A throw-away in-memory DuckDB with views over given files, locked against everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from esper.karn.sql_guard import check_statement
from esper.karn.tables import storage_schema
from esper.leyline.schema import SCHEMAS

MEMORY_LIMIT_BYTES = 4 * 10**9

_DUCKDB_TYPES: Mapping[pa.DataType, str] = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint8(): "UTINYINT",
    pa.uint16(): "USMALLINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.timestamp("us", tz="UTC"): "TIMESTAMPTZ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlSources:
    """All that a connection is made of; it can be handed to another process.

    Attributes:
        ref: `NAME@n`, for messages.
        files: Absolute paths of the Parquet files of each table.
        tables: Small tables that are computed, by name; those that begin with `_` are for views alone.
        views: SQL by name, in an order in which each names only what is before it.
    """

    ref: str
    files: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, pa.Table]
    views: Mapping[str, str]


def open_connection(sources: SqlSources) -> duckdb.DuckDBPyConnection:
    """Return a connection on which nothing but the sources can be read and nothing can be changed.

    It is inside a read-only transaction, spills nothing to disk, and no setting of it can be changed.

    Raises:
        QueryError: A view is not one statement that only reads.
        duckdb.Error: A file is missing or damaged, or a view is wrong.
    """
    connection = duckdb.connect(
        ":memory:",
        config={
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "memory_limit": f"{MEMORY_LIMIT_BYTES}B",
            "temp_directory": "",
        },
    )
    try:
        for name, table in sources.tables.items():
            connection.register("_given", table)
            connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM _given')  # noqa: S608
            connection.unregister("_given")
        _lock(connection, [path for table in SCHEMAS for path in sources.files[table]])
        for table in reversed(SCHEMAS):
            _create_base_view(connection, table, sources.files[table])
        for name, sql in sources.views.items():
            check_statement(connection, sql)
            connection.execute(f'CREATE VIEW "{name}" AS {sql.rstrip().rstrip(";")}')
        connection.execute("BEGIN TRANSACTION READ ONLY")
    except BaseException:
        connection.close()
        raise
    return connection


def view_columns(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    """Return the columns of every view."""
    rows = connection.execute(
        "SELECT table_name, list(column_name ORDER BY ordinal_position) FROM information_schema.columns "
        "WHERE table_schema = 'main' AND NOT starts_with(table_name, '_') GROUP BY 1 ORDER BY 1"
    ).fetchall()
    return {name: list(columns) for name, columns in rows}


def function_names(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the names of the functions of expressions: scalars, aggregates, windows and macros."""
    rows = connection.execute(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_name[1] BETWEEN 'a' AND 'z' "
        "AND function_type IN ('scalar', 'aggregate', 'macro', 'window') ORDER BY 1"
    ).fetchall()
    return [name for (name,) in rows]


def _lock(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    paths = ", ".join(_literal(path) for path in files)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET allowed_paths = [{paths}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _create_base_view(connection: duckdb.DuckDBPyConnection, table: str, files: tuple[str, ...]) -> None:
    """One view over a table's files: schema types and order, last attempts of existing episodes."""
    source = _source(files, table)
    if table == "episodes":
        connection.execute(
            f"CREATE TABLE _attempts AS SELECT episode_id, attempt, commit_id FROM {source} QUALIFY row_number() OVER "  # noqa: S608
            "(PARTITION BY episode_id ORDER BY attempt DESC, commit_id DESC) = 1"
        )
    described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()  # noqa: S608
    present = {row[0] for row in described}
    columns = ", ".join(_cast(field, present) for field in SCHEMAS[table])
    connection.execute(
        f"CREATE VIEW {table} AS SELECT {columns} FROM {source} "  # noqa: S608
        "SEMI JOIN _attempts USING (episode_id, attempt, commit_id)"
    )


def _source(files: tuple[str, ...], table: str) -> str:
    if not files:
        columns = ", ".join(f'NULL::{_duckdb_type(field.type)} AS "{field.name}"' for field in storage_schema(table))
        return f"(SELECT {columns} LIMIT 0)"
    paths = ", ".join(_literal(path) for path in files)
    return (
        f"read_parquet([{paths}], union_by_name = true, hive_partitioning = true, "
        "hive_types = {'environment': VARCHAR})"
    )


def _cast(field: pa.Field, present: set[str]) -> str:
    value = f'"{field.name}"' if field.name in present else "NULL"
    return f'CAST({value} AS {_duckdb_type(field.type)}) AS "{field.name}"'


def _duckdb_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_duckdb_type(kind.value_type)}[]"
    return _DUCKDB_TYPES[kind]


def _literal(path: str) -> str:
    return "'" + path.replace("'", "''") + "'"
