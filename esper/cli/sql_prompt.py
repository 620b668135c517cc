"""The prompt of `esper sql`: statements until a semicolon, commands that begin with a point, a history."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from esper.cli.output import Format, choose_format, note, rich_table, write_table
from esper.cli.sql import check_output
from esper.karn.saved import read_query, saved_queries
from esper.karn.sql_guard import ends_statement
from esper.leyline.errors import EsperError, SpecError, unknown_name

if TYPE_CHECKING:
    from esper.karn.sql_session import SqlSession

COMMANDS = {
    ".help": "list the commands",
    ".tables": "list the views; .tables NAME lists the columns of one",
    ".queries": "list the saved queries",
    ".run": ".run NAME runs a saved query",
    ".format": ".format table, csv, json or parquet; without a name, by the suffix of the output, else a table",
    ".output": ".output FILE writes the next result there instead of showing it",
    ".quit": "leave, as Ctrl-D does",
}

KEYWORDS = (
    *("SELECT", "FROM", "WHERE", "GROUP BY", "ORDER BY", "HAVING", "LIMIT", "WITH", "AS", "JOIN", "LEFT JOIN", "USING"),
    *("ON", "AND", "OR", "NOT", "IN", "IS", "NULL", "BETWEEN", "LIKE", "CASE", "WHEN", "THEN", "ELSE", "END", "ASC"),
    *("DESC", "DISTINCT", "UNION ALL", "OVER", "PARTITION BY", "FILTER", "QUALIFY", "DESCRIBE", "SUMMARIZE", "EXPLAIN"),
    *("count(*)", "avg(", "sum(", "min(", "max(", "stddev(", "quantile_cont(", "corr(", "round("),
)

_WORD = re.compile(r"[.\w]+$")


def history_file() -> Path:
    """Return where the prompt keeps its history: $XDG_STATE_HOME/esper/sql_history, by default under ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "esper" / "sql_history"


class SqlPrompt:
    """Reads and runs statements until Ctrl-D; nothing but that and `.quit` ends it."""

    def __init__(self, session: SqlSession, *, form: Format | None = None, output: Path | None = None) -> None:
        self.session = session
        self.form = form
        self.output = output
        self._open = True

    def loop(self) -> None:
        """Run the prompt (QueryError, IntegrityError where the version cannot be opened)."""
        ref = self.session.version.ref
        reader: PromptSession[str] = PromptSession(
            message=f"{ref}> ",
            prompt_continuation=lambda width, *_: "... ".rjust(width),
            multiline=True,
            key_bindings=_keys(),
            history=_history(),
            completer=SqlCompleter(self.session.columns()),
            complete_while_typing=False,
            lexer=PygmentsLexer(SqlLexer),
        )
        note(f"{ref}: statements end with a semicolon; .help lists the commands, Ctrl-D leaves")
        while self._open:
            try:
                self.take(reader.prompt())
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    def take(self, text: str) -> None:
        """Carry out what was entered; errors are shown, and Ctrl-C ends the statement that runs."""
        try:
            if text.strip().startswith("."):
                self._command(*text.strip().rstrip(";").split(maxsplit=1))
            else:
                self._run(text)
        except EsperError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("interrupted")

    def _run(self, text: str) -> None:
        for statement in self.session.statements(text) if text.strip() else ():
            start = time.monotonic()
            result = self.session.run(statement)
            output, self.output = self.output, None
            write_table(result, choose_format(self.form, output), output)
            note(f"{result.num_rows:,} rows in {time.monotonic() - start:.2f} s")

    def _command(self, name: str, argument: str | None = None) -> None:
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        if name == ".quit":
            self._open = False
        elif name == ".help":
            _show(("command", "does"), COMMANDS.items())
        elif name == ".queries":
            _show(("query", "answers"), saved_queries().items())
        elif name == ".tables":
            self._tables(argument)
        elif name == ".run":
            if argument is None:
                raise SpecError(".run wants the name of a saved query\n  .queries lists them")
            self._run(read_query(argument))
        elif name == ".format":
            if argument is not None and argument not in get_args(Format):
                raise unknown_name("format", argument, get_args(Format))
            self.form = argument  # type: ignore[assignment]
        else:
            output = None if argument is None else Path(argument).expanduser()
            check_output(self.session.version, output)
            self.output = output

    def _tables(self, name: str | None) -> None:
        columns = self.session.columns()
        if name is None:
            _show(("view", "columns"), ((view, len(names)) for view, names in columns.items()))
            return
        if name not in columns:
            raise unknown_name("table", name, columns)
        _show(("column",), ((column,) for column in columns[name]))


class SqlCompleter(Completer):
    """Completes views, columns and keywords; after a point commands, after `.run` saved queries."""

    def __init__(self, columns: dict[str, list[str]]) -> None:
        names = {column for of_view in columns.values() for column in of_view}
        self.views = sorted(columns)
        self.words = [*self.views, *sorted(names - set(self.views)), *KEYWORDS]

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what the word before the cursor can become."""
        before = document.text_before_cursor
        command, space, argument = before.lstrip().partition(" ")
        if command.startswith("."):
            word = argument if space else command
            known = self._arguments(command) if space else list(COMMANDS)
        else:
            found = _WORD.search(before)
            word = found.group().rpartition(".")[2] if found else ""
            known = self.words
        for name in known:
            if name.lower().startswith(word.lower()):
                yield Completion(name, start_position=-len(word))

    def _arguments(self, command: str) -> list[str]:
        if command == ".run":
            return list(saved_queries())
        if command == ".format":
            return list(get_args(Format))
        return self.views if command == ".tables" else []


def _history() -> History:
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError as error:
        note(f"note: no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    """Enter takes what is complete (a command, a statement with its semicolon, nothing), else it begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        text = event.current_buffer.text
        if not text.strip() or text.strip().startswith(".") or ends_statement(text):
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return keys


def _show(names: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    print(rich_table(names, [list(row) for row in rows]), end="")
