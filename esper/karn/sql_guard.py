"""Which SQL may run: one statement that only reads, decided by DuckDB's own parser.

A statement of type SELECT is not enough: DuckDB 2 accepts COPY and DELETE inside a CTE, and EXPLAIN ANALYZE carries out
what it explains. So every keyword that writes is refused wherever it stands; a name spelled like one can be quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import duckdb

from esper.leyline.errors import QueryError, nearest

READING = frozenset({"SELECT", "EXPLAIN"})
"""Statement types that may run; WITH, FROM, VALUES, DESCRIBE, SUMMARIZE and SHOW are SELECT to DuckDB."""

WRITING_WORDS = frozenset(
    (
        "alter",
        "attach",
        "call",
        "checkpoint",
        "copy",
        "create",
        "deallocate",
        "delete",
        "detach",
        "drop",
        "execute",
        "export",
        "import",
        "insert",
        "install",
        "load",
        "merge",
        "pragma",
        "prepare",
        "reset",
        "set",
        "truncate",
        "update",
        "use",
        "vacuum",
    )
)

EXPECTED = "expected: exactly one SELECT, WITH, DESCRIBE or EXPLAIN statement"

_UNKNOWN_COLUMN = (
    re.compile(r'Referenced column "(?P<name>[^"]+)" not found'),
    re.compile(r'does not have a column named "(?P<name>[^"]+)"'),
    re.compile(r'Referenced table "(?P<table>[^"]+)" not found'),
)
_UNKNOWN_TABLE = re.compile(r'Table with name "?(?P<name>.+?)"? does not exist')


def check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise QueryError unless `sql` is exactly one statement that only reads."""
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryError(f"not valid SQL: {_first_lines(error)}") from None
    if len(statements) != 1:
        raise QueryError(f"found {len(statements)} statements\n  {EXPECTED}")
    kind = statements[0].type.name
    if kind not in READING:
        raise QueryError(f"a {kind} statement is not allowed: a sealed version is only read\n  {EXPECTED}")
    word = _writing_word(sql)
    if word:
        raise QueryError(
            f"{word.upper()} is not allowed anywhere in a query: a sealed version is only read\n"
            f'  {EXPECTED}; a name spelled like it can be quoted: "{word}"'
        )


def _writing_word(sql: str) -> str | None:
    """The first keyword that writes; strings, comments and quoted names do not count."""
    encoded = sql.encode()
    tokens = duckdb.tokenize(sql)
    ends = [offset for offset, _ in tokens[1:]] + [len(encoded)]
    for (offset, kind), end in zip(tokens, ends):
        if "keyword" not in str(kind) and "identifier" not in str(kind):
            continue
        word = encoded[offset:end].decode(errors="replace").strip().lower()
        if word in WRITING_WORDS:
            return word
    return None


def explain_error(error: duckdb.Error, columns: Mapping[str, Iterable[str]]) -> QueryError:
    """Return the error to show, with the nearest known name where a name is unknown.

    Args:
        error: What DuckDB raised.
        columns: Columns by view.
    """
    text = str(error)
    table = _UNKNOWN_TABLE.search(text)
    if table:
        return _unknown("table", table["name"], columns)
    for pattern in _UNKNOWN_COLUMN:
        found = pattern.search(text)
        if found and "table" in found.groupdict():
            return _unknown("table", found["table"], columns)
        if found:
            return _unknown("column", found["name"], {name for names in columns.values() for name in names})
    return QueryError(f"the query failed: {_first_lines(error)}")


def _unknown(kind: str, name: str, known: Iterable[str]) -> QueryError:
    names = sorted(known)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    listing = ", ".join(names) if len(names) <= 24 else f"{len(names)} of them; DESCRIBE steps lists those of `steps`"
    return QueryError(f"unknown {kind} {name!r}{hint}\n  known: {listing}")


def _first_lines(error: duckdb.Error) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not set(line.strip()) <= {"^"}]
    return "\n  ".join(lines[:4])
