"""`esper sql`: read a sealed version with SQL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from esper.cli.output import Format, choose_format, note, note_verdict, write_table
from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from esper.karn.store import Store
    from esper.karn.versions import Version


def sql(
    statement: str | None = None,
    /,
    *,
    dataset: str | None = None,
    store: str | None = None,
    query: str | None = None,
    list_queries: Annotated[bool, Parameter(name="--list", negative="")] = False,
    format: Format | None = None,
    output: Path | None = None,
    timeout: float = 60.0,
) -> None:
    """Query a sealed version with SQL.

    Views: steps, episodes, costs, decisions, returns, cells, lineages. `DESCRIBE decisions` lists the columns of one.
    One SELECT, WITH, DESCRIBE or EXPLAIN is run, and nothing but the version's files can be read.

    Args:
        statement: The SQL.
        dataset: NAME or NAME@n (default: the only dataset of the store, its latest version).
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        query: Name of a saved query, or a .sql file, instead of a statement.
        list_queries: List the saved queries and run nothing.
        format: table, csv, json or parquet (default: by the suffix of the output, else table).
        output: Write to this file instead of stdout.
        timeout: Seconds after which the query is interrupted.
    """
    from esper.karn.saved import read_query, saved_queries

    if list_queries:
        _list(saved_queries(), choose_format(format, output), output)
        return
    if (statement is None) == (query is None):
        raise SpecError(
            'give a statement or --query NAME\n  example: esper sql "SELECT * FROM cells"; --list lists names'
        )
    if timeout <= 0:
        raise SpecError(f"--timeout is {timeout:g}\n  expected: a positive number of seconds")
    from esper.karn.catalogue import query as run_query
    from esper.karn.store import open_store

    text = read_query(query) if query is not None else str(statement)
    version = only_version(open_store(store), dataset)
    result = run_query(version, text, timeout_s=timeout)
    write_table(result, choose_format(format, output), output)
    note(f"{result.num_rows:,} rows from {version.ref}")
    note_verdict(version, only_bad=True)


def _list(queries: dict[str, str], form: Format, output: Path | None) -> None:
    import pyarrow as pa

    table = pa.table({"query": list(queries), "answers": list(queries.values())})
    write_table(table, form, output)


def only_version(store: Store, ref: str | None) -> Version:
    """Return the version named, or the latest of the store's only dataset (SpecError where there are several)."""
    if ref is not None:
        return store.resolve(ref)
    names = store.names()
    if len(names) != 1:
        found = f"holds {', '.join(names)}" if names else "holds no dataset; `esper datagen` makes one"
        raise SpecError(f"which dataset? the store at {store.root} {found}\n  name one with --dataset NAME[@n]")
    return store.resolve(names[0])
