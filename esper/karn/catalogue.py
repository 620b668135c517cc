"""SQL over one sealed version: throw-away in-memory views over exactly its files, locked against everything else."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

from esper.karn.sql_guard import check_statement, explain_error
from esper.karn.tables import storage_schema
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, QueryError
from esper.leyline.library import find, names
from esper.leyline.schema import SCHEMAS

MEMORY_LIMIT = "4GB"
TIMEOUT_S = 60.0

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


def connect(version: Version) -> duckdb.DuckDBPyConnection:
    """Return a connection with the views `steps`, `costs`, `episodes` and those under datasets/views.

    It reads the version's files and nothing else: no other file, no network, no extension, no setting can be changed.
    Rows have no order of their own. Close it after use.

    Raises:
        IntegrityError: A file of the version is missing or damaged.
    """
    connection = duckdb.connect(
        ":memory:",
        config={
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "memory_limit": MEMORY_LIMIT,
        },
    )
    try:
        _lock(connection, [path for table in SCHEMAS for path in version.files(table)])
        for table in reversed(SCHEMAS):
            _create_base_view(connection, version, table)
        for name in names("views", ".sql"):
            sql = find("views", name, ".sql").read_text(encoding="utf-8")
            check_statement(connection, sql)
            connection.execute(f'CREATE VIEW "{name}" AS {sql.rstrip().rstrip(";")}')
        connection.execute("BEGIN TRANSACTION READ ONLY")
    except duckdb.Error as error:
        connection.close()
        damaged = _is_damage(error)
        kind: type[IntegrityError | QueryError] = IntegrityError if damaged else QueryError
        raise kind(f"{version.ref} cannot be opened: {str(error).splitlines()[0]}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def query(version: Version, sql: str, *, timeout_s: float = TIMEOUT_S) -> pa.Table:
    """Return the result of one statement that only reads.

    Raises:
        QueryError: Anything but one SELECT, WITH, DESCRIBE or EXPLAIN; an unknown name; a failure; the time or memory
            limit.
        IntegrityError: A file of the version is missing or damaged.
    """
    connection = connect(version)
    timer = threading.Timer(timeout_s, connection.interrupt)
    timer.daemon = True
    try:
        check_statement(connection, sql)
        columns = view_columns(connection)
        timer.start()
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.InterruptException:
            raise QueryError(
                f"the query took longer than {timeout_s:g} s\n  narrow it, or raise the limit with --timeout"
            ) from None
        except duckdb.OutOfMemoryException:
            raise QueryError(f"the query needs more than {MEMORY_LIMIT} of memory\n  narrow it") from None
        except duckdb.Error as error:
            if _is_damage(error):
                raise IntegrityError(
                    f"{version.ref} is damaged: {str(error).splitlines()[0]}\n"
                    f"  `esper dataset verify {version.ref}` lists every problem"
                ) from None
            raise explain_error(error, columns) from None
        except RuntimeError as error:
            if str(error) == "Query interrupted":  # how DuckDB reports Ctrl-C
                raise KeyboardInterrupt from None
            raise
    finally:
        timer.cancel()
        connection.close()


def view_columns(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    """Return the columns of every view."""
    rows = connection.execute(
        "SELECT table_name, list(column_name ORDER BY ordinal_position) FROM information_schema.columns "
        "WHERE table_schema = 'main' AND table_name <> '_attempts' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    return {name: list(columns) for name, columns in rows}


def _lock(connection: duckdb.DuckDBPyConnection, files: list[Path]) -> None:
    paths = ", ".join(_literal(path) for path in files)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET allowed_paths = [{paths}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _create_base_view(connection: duckdb.DuckDBPyConnection, version: Version, table: str) -> None:
    """One view over a table's files: schema types and order, last attempts of existing episodes."""
    source = _source(version.files(table), table)
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


def _source(files: list[Path], table: str) -> str:
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


def _literal(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _is_damage(error: duckdb.Error) -> bool:
    """Whether a file could not be read, as opposed to a query that is wrong."""
    if isinstance(error, (duckdb.PermissionException, duckdb.CatalogException, duckdb.BinderException)):
        return False
    return isinstance(error, duckdb.IOException) or "parquet" in str(error).splitlines()[0].lower()
