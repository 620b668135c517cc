"""`esper health`: is a sealed version fit for its uses, which rows are not, and what would help?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from esper.cli.launch import launch
from esper.cli.output import note, write_table, write_text
from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from esper.karn.versions import Version
    from flows.health import Checked
    from quality.summary import SummaryRow

Flag = Annotated[bool, Parameter(negative="")]
STYLES = {"block": "bold red", "warn": "yellow", "pass": "green", "report": "dim"}


def health(
    dataset: str,
    /,
    *,
    store: str | None = None,
    format: Literal["table", "json", "csv"] = "table",
    show_all: Annotated[bool, Parameter(name="--all", negative="")] = False,
    rows: str | None = None,
    limit: int = 200,
    suggest: Flag = False,
    output: Path | None = None,
    prefect: bool = False,
    run_name: str | None = None,
) -> None:
    """Check a sealed version, store its verdict and write its page; exits with 3 where it is blocked for offline RL.

    Args:
        dataset: NAME or NAME@n.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        format: A table, or the verdict as JSON; the rows of --rows also as CSV.
        show_all: List the checks that pass and what is reported too.
        rows: List the rows that fail this check, and check nothing.
        limit: At most this many of them.
        suggest: Print a matrix that would lift the weakest checks; `esper datagen` takes it.
        output: Write the rows or the matrix to this file instead of stdout.
        prefect: Run as a flow of a Prefect server.
        run_name: Name of the run's folder, which holds page and Data Docs (default: command and time).
    """
    from flows.health import HealthRequest, require_offline_rl, run_health

    _check_options(format, rows, limit, suggest, output)
    request = HealthRequest.parse(
        {"dataset": dataset, "store": store, "run_name": run_name, "workers": 0}, "esper health"
    )
    if rows is not None:
        _list_rows(_resolve(request.store, dataset), rows, limit, format, output)
        return
    if suggest:
        _suggest(request.store, dataset, output)
        return
    checked = launch("health", request, run_health, prefect=prefect)
    if format == "json":
        _print_json(checked)
    else:
        _print_table(checked, show_all)
    require_offline_rl(checked.verdict)
    if format == "table":
        print(f"next: esper train iql {checked.version.ref}")


def _check_options(format: str, rows: str | None, limit: int, suggest: bool, output: Path | None) -> None:
    if rows is not None and suggest:
        raise SpecError("--rows and --suggest\n  expected: one of them at a time")
    if format == "csv" and rows is None:
        raise SpecError("--format csv is for --rows CHECK\n  the verdict is a table or json")
    if output is not None and rows is None and not suggest:
        raise SpecError("--output is for --rows CHECK and --suggest\n  the page lies in the run's folder")
    if limit < 1:
        raise SpecError(f"--limit is {limit}\n  expected: 1 or more")


def _resolve(store: str | None, dataset: str) -> Version:
    from esper.karn.store import open_store

    return open_store(store).resolve(dataset)


def _list_rows(
    version: Version, check: str, limit: int, format: Literal["table", "json", "csv"], output: Path | None
) -> None:
    from esper.karn.catalogue import connect
    from quality.rows import failing_rows

    connection = connect(version)
    try:
        table = failing_rows(connection, check, limit)
    finally:
        connection.close()
    write_table(table, format, output)
    least = "at least " if table.num_rows == limit else ""
    note(f"{least}{table.num_rows:,} rows of {version.ref} fail {check}")


def _suggest(store: str | None, dataset: str, output: Path | None) -> None:
    from esper.leyline.errors import HealthError
    from quality.suggest import suggest, table_lines, to_toml

    version = _resolve(store, dataset)
    verdict = version.verdict()
    if verdict is None:
        raise HealthError(f"{version.ref} was never checked\n  run `esper health {version.ref}` first")
    suggestion = suggest(version, verdict)
    write_text(to_toml(suggestion), output)
    if output is not None:
        for line in (*table_lines(suggestion), *suggestion.notes):
            note(line)
        note(f"next: esper datagen --matrix {output} --dataset {version.name}")


def _print_json(checked: Checked) -> None:
    from esper.karn.overrides import overrides_of
    from esper.karn.verdict_text import levels

    told = checked.verdict.model_dump(mode="json") | {
        "levels": levels(checked.verdict),
        "overrides": [item.model_dump(mode="json") for item in overrides_of(checked.version)],
        "page": str(checked.page),
    }
    print(json.dumps(told, indent=1))


def _print_table(checked: Checked, show_all: bool) -> None:
    from rich.console import Console

    from esper.karn.overrides import overrides_of
    from esper.karn.verdict_text import levels, override_lines
    from quality.rows import ROW_CHECKS
    from quality.summary import rows

    found = rows(checked.verdict)
    shown = [row for row in found if show_all or row.level in ("block", "warn")]
    console = Console(width=max(110, min(150, shutil.get_terminal_size((140, 40)).columns)), highlight=False)
    if shown:
        console.print(_table(shown))
    print(_folded(found, shown))
    for use, level in levels(checked.verdict).items():
        console.print(f"{use:24} [{STYLES[level]}]{level}[/]")
    for line in override_lines(overrides_of(checked.version)):
        print(f"override: {line}")
    print(f"data docs                {checked.docs / 'index.html'}")
    print(f"page                     {checked.page}")
    fired = [row.check for row in shown if row.level in ("block", "warn")]
    listed = next((check for check in fired if check in ROW_CHECKS), None)
    if listed is not None:
        print(f"which rows: esper health {checked.version.ref} --rows {listed}")
    if fired:
        print(f"what would help: esper health {checked.version.ref} --suggest")


def _table(shown: list[SummaryRow]) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("level", "check", "environment", "value", "threshold", "what to do"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "value" else "left")
    for row in shown:
        advice = escape(row.message) + (f"\n[bold]{escape(row.remedy)}[/]" if row.remedy else "")
        level = f"[{STYLES[row.level]}]{row.level}[/]"
        limits = row.threshold.replace(", ", "\n")
        table.add_row(level, escape(row.check), escape(row.environment), row.value, limits, advice)
    return table


def _folded(found: list[SummaryRow], shown: list[SummaryRow]) -> str:
    """How many checks there are of each kind, and how to see those that are not listed."""
    count = {level: sum(row.level == level for row in found) for level in STYLES}
    parts = [f"{count['block']} block", f"{count['warn']} warn", f"{count['pass']} pass", f"{count['report']} reported"]
    return ", ".join(parts) + ("" if len(shown) == len(found) else "; --all lists every one")
