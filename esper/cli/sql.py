"""`esper sql`: read a sealed version with SQL."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from esper.cli.output import Format, choose_format, note, note_verdict, write_table
from esper.leyline.errors import SpecError, nearest

if TYPE_CHECKING:
    from esper.karn.sql_session import SqlSession
    from esper.karn.store import Store
    from esper.karn.versions import Version

PIPED = "-"
_OPTIONS = ("--dataset", "--store", "--query", "--list", "--format", "--output", "--timeout")
_OPTION = re.compile(r"--?[a-z][a-z-]*$")


def sql(
    statement: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *rest: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    dataset: str | None = None,
    store: str | None = None,
    query: str | None = None,
    list_queries: Annotated[bool, Parameter(name="--list", negative="")] = False,
    format: Format | None = None,
    output: Path | None = None,
    timeout: float = 60.0,
) -> None:
    """Query a sealed version with SQL; without a statement, at a prompt.

    Views: steps, episodes, costs, decisions, decision_rewards, returns, returns_by_reward, rewards, cells, progress,
    episode_costs, cell_costs, lineages. `DESCRIBE decisions` lists the columns of one. One SELECT, WITH, DESCRIBE or
    EXPLAIN is run, and nothing but the version's files can be read.

    Args:
        statement: The SQL, quoted; `-`, or none where stdin is no terminal: the statements on stdin, one by one.
        rest: Nothing: words beyond the statement are an error.
        dataset: NAME or NAME@n (default: the only dataset of the store, its latest version).
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        query: Name of a saved query, or a .sql file, instead of a statement.
        list_queries: List the saved queries and run nothing.
        format: table, csv, json or parquet (default: by the suffix of the output, else table).
        output: Write to this file instead of stdout; never one of the store's.
        timeout: Seconds after which the query is interrupted.
    """
    from esper.karn.saved import read_query, saved_queries

    if list_queries:
        _list(saved_queries(), choose_format(format, output), output)
        return
    _check_words([word for word in (statement, *rest) if word is not None])
    if statement is not None and query is not None:
        raise SpecError("a statement and --query exclude each other\n  expected: one of them")
    if timeout <= 0:
        raise SpecError(f"--timeout is {timeout:g}\n  expected: a positive number of seconds")
    piped = query is None and (statement == PIPED or (statement is None and not sys.stdin.isatty()))
    text = read_query(query) if query is not None else _stdin() if piped else statement
    from esper.karn.sql_session import SqlSession
    from esper.karn.store import open_store

    version = only_version(open_store(store), dataset)
    check_output(version, output)
    with SqlSession(version, timeout_s=timeout) as session:
        if text is None:
            from esper.cli.sql_prompt import SqlPrompt

            note_verdict(version, only_bad=True)
            SqlPrompt(session, form=format, output=output).loop()
            return
        statements = session.statements(text) if piped else [text]
        if len(statements) > 1 and output is not None:
            raise SpecError(
                f"{len(statements)} statements on stdin and one --output\n  expected: one statement, or no --output"
            )
        for one in statements:
            run(session, one, format, output)
    note_verdict(version, only_bad=True)


def _stdin() -> str:
    text = sys.stdin.read()
    if not text.strip():
        raise SpecError(
            'no statement was given and stdin is empty\n  example: esper sql "SELECT * FROM cells"; --list names '
            "the saved queries, and at a terminal there is a prompt"
        )
    return text


def run(session: SqlSession, statement: str, format: Format | None, output: Path | None) -> None:
    """Run a statement and write what it returns."""
    result = session.run(statement)
    write_table(result, choose_format(format, output), output)
    note(f"{result.num_rows:,} rows from {session.version.ref}")


def check_output(version: Version, output: Path | None) -> None:
    """Refuse to write a file of the store, whatever name it goes by.

    Raises:
        SpecError: It lies in the store, or is a link to a file of the version.
    """
    if output is None:
        return
    where = output.resolve()
    inside = version.root.resolve().parent in where.parents
    linked = where.is_file() and any(where.samefile(version.root / entry.path) for entry in version.manifest.files)
    if inside or linked:
        raise SpecError(
            f"--output {output} {'is a file of' if linked else 'lies in'} the store at {version.root.parent}\n"
            "  expected: a file elsewhere; what is sealed is never written over"
        )


def _check_words(words: Sequence[str]) -> None:
    """Raise SpecError where an option is misspelt, or the statement is not one word of the shell."""
    for word in words:
        if _OPTION.match(word):
            close = nearest(word, _OPTIONS)
            hint = f"; did you mean {close}?" if close else ""
            raise SpecError(f"unknown option {word}{hint}\n  `esper sql --help` lists the options")
    if len(words) > 1:
        raise SpecError(f'{len(words)} words where one statement is expected\n  quote it: esper sql "SELECT 1"')


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
        raise SpecError(f"which dataset? the store at {store.place.show()} {found}\n  name one with --dataset NAME[@n]")
    return store.resolve(names[0])
