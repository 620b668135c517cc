"""SQL of people over one sealed version: in a process of its own, with a time and a memory that it cannot exceed."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from esper.karn import sql_worker
from esper.karn.catalogue import TIMEOUT_S, sources_of
from esper.karn.sql_connection import MEMORY_LIMIT_BYTES
from esper.karn.sql_guard import too_large, too_slow
from esper.karn.versions import Version
from esper.leyline.errors import QueryError

HEADROOM_BYTES = 2 * 10**9
"""What the process may have beside DuckDB's own memory: buffers, stacks, and a GB that an allocator only reserves."""

MAX_RESULT_BYTES = 2 * 10**9
START_S = 60.0


class SqlSession:
    """Runs statements on one version, one at a time. A context manager; the process starts with the first statement.

    What takes too long, needs too much memory, has too large a result or is interrupted ends the process, and the next
    statement starts another.
    """

    def __init__(
        self,
        version: Version,
        *,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int = MEMORY_LIMIT_BYTES + HEADROOM_BYTES,
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        self.version = version
        self.timeout_s = timeout_s
        self.memory_bytes = min(memory_bytes, _physical_bytes())
        self.max_result_bytes = max_result_bytes
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> SqlSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, sql: str) -> pa.Table:
        """Return the result of one statement that only reads.

        Raises:
            QueryError: Anything but one SELECT, WITH, DESCRIBE or EXPLAIN; an unknown name; a failure; the limit of
                time, memory or size of the result.
            IntegrityError: A file of the version is missing or damaged.
        """
        with _EndingOnError(self):
            pipe = self._open()
            deadline = time.monotonic() + self.timeout_s
            self._send(pipe, "run", sql)
            schema = sql_worker.read_schema(self._receive(pipe, deadline))
            batches = [sql_worker.read_batch(message) for message in self._rows(pipe, deadline)]
            return pa.Table.from_batches(batches, schema)

    def statements(self, text: str) -> list[str]:
        """Return the statements of a text, without their semicolons (QueryError where it is not SQL)."""
        found: list[str] = self._ask("split", text)
        return found

    def columns(self) -> dict[str, list[str]]:
        """Return the columns of every view."""
        found: dict[str, list[str]] = self._ask("columns")
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _ask(self, command: str, text: str = "") -> Any:
        with _EndingOnError(self):
            pipe = self._open()
            self._send(pipe, command, text)
            return json.loads(self._receive(pipe, time.monotonic() + self.timeout_s)[1:])

    def _open(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        sources = sources_of(self.version)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["__main__", sql_worker.__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=sql_worker.serve, args=(theirs, sources, self.memory_bytes), name="esper-sql", daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            self.close()
            raise QueryError(f"the process for queries did not start in {START_S:g} s\n  try again")
        pipe = self._pipe
        self._receive(pipe, time.monotonic())
        return pipe

    def _send(self, pipe: Connection, command: str, text: str) -> None:
        try:
            pipe.send_bytes(json.dumps([command, text]).encode())
        except OSError:
            self.close()
            raise self._ended() from None

    def _receive(self, pipe: Connection, deadline: float) -> bytes:
        """Return the next message; raise what it says where it is an error."""
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            self.close()
            raise QueryError(too_slow(self.timeout_s))
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            self.close()
            raise self._ended() from None
        if message[:1] == sql_worker.LAST:
            self.close()
        if message[:1] in {sql_worker.ERROR, sql_worker.LAST}:
            raise sql_worker.read_error(message)
        return message

    def _ended(self) -> QueryError:
        return QueryError(f"the query's process ended; most likely {too_large(self.memory_bytes)}")

    def _rows(self, pipe: Connection, deadline: float) -> Iterator[bytes]:
        size = 0
        while (message := self._receive(pipe, deadline))[:1] == sql_worker.BATCH:
            size += len(message)
            if size > self.max_result_bytes:
                self.close()
                raise QueryError(
                    f"the result is larger than {self.max_result_bytes / 1e9:.3g} GB\n"
                    "  add a LIMIT, select fewer columns, or aggregate in SQL"
                )
            yield message


class _EndingOnError:
    """Ends the process where something other than an error of the statement comes up, above all Ctrl-C."""

    def __init__(self, session: SqlSession) -> None:
        self.session = session

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.session.close()


def _physical_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
