"""The process in which a stranger's SQL runs: it reads one version, writes no file, and cannot outgrow its memory.

DuckDB's own limits are not enough: a scalar such as range(10^9) allocates beside `memory_limit` and hears no interrupt.
The process can be killed at any moment; nothing but its pipe knows of it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from multiprocessing.connection import Connection

import duckdb
import pyarrow as pa

from esper.karn.sql_connection import SqlSources, function_names, open_connection, view_columns
from esper.karn.sql_guard import check_statement, failure, is_damage, split_statements, too_large
from esper.leyline.errors import EsperError, IntegrityError, QueryError

BATCH_ROWS = 20_000

SCHEMA, BATCH, END, ERROR, LAST, ANSWER = b"s", b"b", b"e", b"x", b"l", b"a"
"""First byte of a message to the parent: Arrow schema, record batch, end of rows, error, error with which the process
ends, answer in JSON."""

_ERRORS: dict[str, type[EsperError]] = {"IntegrityError": IntegrityError, "QueryError": QueryError}


def serve(pipe: Connection, sources: SqlSources, memory_bytes: int) -> None:
    """Answer requests until the pipe closes: `(command, text)` in JSON, one at a time.

    `run` sends the rows of a statement, `split` the statements of a text, `columns` those of every view.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who kills this process
    _limit(memory_bytes)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            connection = open_connection(sources)
        except duckdb.Error as error:
            kind: type[EsperError] = IntegrityError if is_damage(error) else QueryError
            _send_error(pipe, kind(f"{sources.ref} cannot be opened: {str(error).splitlines()[0]}"), LAST)
            return
        except QueryError as error:
            _send_error(pipe, error, LAST)
            return
        pipe.send_bytes(END)
        while True:
            command, text = json.loads(pipe.recv_bytes())
            try:
                _answer(pipe, connection, sources.ref, command, text)
            except (IntegrityError, QueryError) as error:
                _send_error(pipe, error)
            except (duckdb.OutOfMemoryException, MemoryError):  # Arrow's is one of Python's
                # What DuckDB took it does not give back, and the next statement would find no memory.
                _send_error(pipe, QueryError(too_large(memory_bytes)), LAST)
                return
            except (pa.ArrowException, RuntimeError) as error:
                _begin_again(connection)
                _send_error(pipe, QueryError(f"the query failed: {str(error).splitlines()[0]}"))


def _limit(memory_bytes: int) -> None:
    """No file can grow, memory ends where it should; a limit that is lower already stays."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for kind, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, memory_bytes)):
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))


def _answer(pipe: Connection, connection: duckdb.DuckDBPyConnection, ref: str, command: str, text: str) -> None:
    if command == "run":
        try:
            _run(pipe, connection, text)
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            _begin_again(connection)
            raise failure(error, ref, view_columns(connection), function_names(connection)) from None
        return
    answer = split_statements(connection, text) if command == "split" else view_columns(connection)
    pipe.send_bytes(ANSWER + json.dumps(answer).encode())


def _run(pipe: Connection, connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    check_statement(connection, sql)
    reader = connection.sql(sql).to_arrow_reader(BATCH_ROWS)
    pipe.send_bytes(SCHEMA + reader.schema.serialize().to_pybytes())
    for batch in reader:
        pipe.send_bytes(BATCH + _stream(batch))
    pipe.send_bytes(END)


def _stream(batch: pa.RecordBatch) -> bytes:
    """A batch with its schema and dictionaries."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _begin_again(connection: duckdb.DuckDBPyConnection) -> None:
    """A statement that failed may have ended the transaction."""
    with contextlib.suppress(duckdb.Error):
        connection.execute("ROLLBACK")
    connection.execute("BEGIN TRANSACTION READ ONLY")


def _send_error(pipe: Connection, error: EsperError, kind: bytes = ERROR) -> None:
    pipe.send_bytes(kind + json.dumps([type(error).__name__, str(error)]).encode())


def read_error(message: bytes) -> EsperError:
    """Return the error in an ERROR or LAST message."""
    name, text = json.loads(message[1:])
    return _ERRORS[name](text)


def read_schema(message: bytes) -> pa.Schema:
    """Return the schema in a SCHEMA message."""
    return pa.ipc.read_schema(pa.py_buffer(message[1:]))


def read_batch(message: bytes) -> pa.RecordBatch:
    """Return the rows in a BATCH message."""
    return pa.ipc.open_stream(pa.py_buffer(message[1:])).read_next_batch()
