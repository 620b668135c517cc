"""Which SQL may run: one statement that only reads, decided by DuckDB's own parser.

A statement of type SELECT is not enough: DuckDB 2 accepts COPY and DELETE inside a CTE, and EXPLAIN ANALYZE carries out
what it explains. So every keyword that writes is refused wherever it stands; a name spelled like one can be quoted.
Functions that stand where a table does read files, settings, secrets or memory, or run text as SQL: all but a few are
refused.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping

import duckdb

from esper.leyline.errors import IntegrityError, QueryError, nearest

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

TABLE_FUNCTIONS = frozenset(
    (
        "duckdb_columns",
        "duckdb_functions",
        "duckdb_keywords",
        "duckdb_tables",
        "duckdb_types",
        "duckdb_views",
        "generate_series",
        "histogram",
        "histogram_values",
        "json_each",
        "json_tree",
        "pg_timezone_names",
        "pragma_table_info",
        "range",
        "repeat",
        "repeat_row",
        "unnest",
    )
)
"""The functions in place of a table that may be called: they make rows out of their arguments or of the catalogue."""

REFUSED_SCALARS = frozenset(("current_setting", "getvariable", "json_deserialize_sql", "setseed", "write_log"))

EXPECTED = "expected: exactly one SELECT, WITH, DESCRIBE or EXPLAIN statement"

_UNKNOWN_COLUMN = (
    re.compile(r'Referenced column "(?P<name>[^"]+)" not found'),
    re.compile(r'does not have a column named "(?P<name>[^"]+)"'),
    re.compile(r'Referenced table "(?P<table>[^"]+)" not found'),
)
_UNKNOWN_TABLE = re.compile(r'Table with name "?(?P<name>.+?)"? does not exist')
_UNKNOWN_FUNCTION = re.compile(r'Function with name "?(?P<name>.+?)"? (does not exist|is not in the catalog)')
_CANDIDATES = re.compile(r"Candidate bindings: (?P<names>.+)")
_QUOTED = re.compile(r'"([^"]+)"')


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
    tokens = _tokens(sql)
    word = next((text for text, kind in tokens if _is_name(kind) and text in WRITING_WORDS), None)
    if word:
        raise QueryError(
            f"{word.upper()} is not allowed anywhere in a query: a sealed version is only read\n"
            f'  {EXPECTED}; a name spelled like it can be quoted: "{word}"'
        )
    refused = _table_functions() - TABLE_FUNCTIONS | REFUSED_SCALARS
    for (text, kind), (following, _) in itertools.pairwise([token for token in tokens if token[1] != "comment"]):
        name = text.strip('"').replace('""', '"')
        if following == "(" and _is_name(kind) and name in refused:
            raise QueryError(
                f"function {name!r} is not allowed: a query reads the views of one version and nothing else\n"
                f"  in place of a table: {', '.join(sorted(TABLE_FUNCTIONS))}"
            )


def split_statements(connection: duckdb.DuckDBPyConnection, text: str) -> list[str]:
    """Return the statements of a text; QueryError where it is not SQL."""
    try:
        return [statement.query.strip() for statement in connection.extract_statements(text)]
    except duckdb.Error as error:
        raise QueryError(f"not valid SQL: {_first_lines(error)}") from None


def ends_statement(text: str) -> bool:
    """Return whether a text ends with the semicolon of a statement, and not inside a string or a comment."""
    tokens = [token for token in _tokens(text) if token[1] != "comment"]
    return bool(tokens) and tokens[-1] == (";", "operator")


def _tokens(sql: str) -> list[tuple[str, str]]:
    """Each token in lower case and its kind: `keyword`, `identifier`, `comment`, `operator` and others."""
    encoded = sql.encode()
    tokens = duckdb.tokenize(sql)
    ends = [offset for offset, _ in tokens[1:]] + [len(encoded)]
    return [
        (encoded[offset:end].decode(errors="replace").strip().lower(), str(kind).rpartition(".")[2])
        for (offset, kind), end in zip(tokens, ends)
    ]


def _is_name(kind: str) -> bool:
    return kind in {"keyword", "identifier"}


@functools.cache
def _table_functions() -> frozenset[str]:
    """What DuckDB can call in place of a table."""
    with duckdb.connect(":memory:", config={"autoload_known_extensions": "false"}) as connection:
        rows = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() "
            "WHERE function_type IN ('table', 'table_macro', 'pragma')"
        ).fetchall()
    return frozenset(name for (name,) in rows)


def failure(
    error: duckdb.Error, ref: str, columns: Mapping[str, Iterable[str]], functions: Iterable[str]
) -> IntegrityError | QueryError:
    """Return the error to show for what DuckDB raised while it ran a statement on the version `ref`."""
    if is_damage(error):
        return IntegrityError(
            f"{ref} is damaged: {str(error).splitlines()[0]}\n  `esper dataset verify {ref}` lists every problem"
        )
    return explain_error(error, columns, functions)


def is_damage(error: duckdb.Error) -> bool:
    """Return whether a file could not be read, as opposed to a query that is wrong."""
    if isinstance(error, (duckdb.PermissionException, duckdb.CatalogException, duckdb.BinderException)):
        return False
    return isinstance(error, duckdb.IOException) or "parquet" in str(error).splitlines()[0].lower()


def explain_error(
    error: duckdb.Error, columns: Mapping[str, Iterable[str]], functions: Iterable[str] = ()
) -> QueryError:
    """Return the error to show, with the nearest known name where a name is unknown.

    Args:
        error: What DuckDB raised.
        columns: Columns by view.
        functions: Names of functions.
    """
    text = str(error)
    table = _UNKNOWN_TABLE.search(text)
    if table:
        return _unknown("table", table["name"], columns)
    function = _UNKNOWN_FUNCTION.search(text)
    if function:
        return _unknown("function", function["name"], functions)
    for pattern in _UNKNOWN_COLUMN:
        found = pattern.search(text)
        if found and "table" in found.groupdict():
            return _unknown("table", found["table"], columns)
        if found:
            return _unknown("column", found["name"], _columns_in_reach(text, columns))
    return QueryError(f"the query failed: {_first_lines(error)}")


def _columns_in_reach(text: str, columns: Mapping[str, Iterable[str]]) -> set[str]:
    """What DuckDB says could have been meant, which knows the statement's own names, and the columns of every view."""
    candidates = _CANDIDATES.search(text)
    named = _QUOTED.findall(candidates["names"]) if candidates else []
    return {name.rpartition(".")[2] for name in named} | {name for names in columns.values() for name in names}


def _unknown(kind: str, name: str, known: Iterable[str]) -> QueryError:
    names = sorted(known)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    where = {"column": "DESCRIBE steps lists those of `steps`", "function": "SELECT * FROM duckdb_functions()"}
    listing = ", ".join(names) if len(names) <= 24 else f"{len(names)} of them; {where.get(kind, 'SHOW TABLES')}"
    return QueryError(f"unknown {kind} {name!r}{hint}\n  known: {listing}")


def too_slow(timeout_s: float) -> str:
    """Return the message where a statement took longer than its time."""
    return f"the query took longer than {timeout_s:g} s\n  narrow it, or raise the limit with --timeout"


def too_large(limit_bytes: int) -> str:
    """Return the message where a statement needed more than its memory."""
    return f"the query needs more than {limit_bytes / 1e9:.3g} GB of memory\n  narrow it, or aggregate in SQL"


def _first_lines(error: duckdb.Error) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not set(line.strip()) <= {"^"}]
    return "\n  ".join(lines[:4])
