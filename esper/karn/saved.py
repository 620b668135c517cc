"""Saved queries: SQL files that come with the code or lie under ./datasets/queries."""

from __future__ import annotations

from esper.leyline.errors import SpecError
from esper.leyline.library import find, names

KIND, SUFFIX = "queries", ".sql"


def saved_queries() -> dict[str, str]:
    """Return the description of every saved query by name: the first comment line of its file."""
    return {name: description(read_query(name)) for name in names(KIND, SUFFIX)}


def read_query(name: str) -> str:
    """Return the SQL of a saved query, or of a path to a .sql file (UnknownNameError where there is none)."""
    path = find(KIND, name, SUFFIX)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None


def description(sql: str) -> str:
    """Return the first comment line of a query, empty without one."""
    first = sql.strip().splitlines()[0] if sql.strip() else ""
    return first.removeprefix("--").strip() if first.startswith("--") else ""
