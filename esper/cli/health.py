"""`esper health`: is a sealed version fit for its uses?"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from esper.cli.launch import launch

if TYPE_CHECKING:
    from esper.leyline.verdict import CheckResult, Verdict
    from flows.health import Checked


def health(
    dataset: str,
    /,
    *,
    store: str | None = None,
    format: Literal["table", "json"] = "table",
    no_prefect: Annotated[bool, Parameter(negative="")] = False,
    run_name: str | None = None,
) -> None:
    """Check a sealed version and store its verdict; exits with 3 where it is blocked for offline RL.

    Args:
        dataset: NAME or NAME@n.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        format: A table, or the verdict as JSON.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder, which holds the Data Docs (default: command and time).
    """
    from flows.health import HealthRequest, require_offline_rl, run_health

    request = HealthRequest.parse({"dataset": dataset, "store": store, "run_name": run_name}, "esper health")
    checked = launch("health", request, run_health, prefect=not no_prefect)
    if format == "json":
        print(json.dumps(checked.verdict.model_dump(mode="json") | {"levels": _levels(checked.verdict)}, indent=1))
    else:
        _print_table(checked)
    require_offline_rl(checked.verdict)
    if format == "table":
        print(f"next: esper train iql {checked.version.ref}")


def _levels(verdict: Verdict) -> dict[str, str]:
    from esper.leyline.verdict import Use

    return {use.value: verdict.level(use).value for use in Use}


def _print_table(checked: Checked) -> None:
    from rich.console import Console
    from rich.table import Table

    styles = {"block": "bold red", "warn": "yellow", "pass": "green", "report": "dim"}
    table = Table(box=None, pad_edge=False)
    for heading in ("level", "environment", "check", "value", "threshold", "what it says"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "value" else "left")
    for check in _sorted(checked.verdict):
        value = "–" if check.value is None else f"{check.value:.4g}"
        style = styles[check.level.value]
        table.add_row(
            f"[{style}]{check.level.value}[/]", check.environment, check.name, value, _thresholds(check), _advice(check)
        )
    console = Console(width=max(120, shutil.get_terminal_size((160, 40)).columns), highlight=False)
    console.print(table)
    for use, level in _levels(checked.verdict).items():
        print(f"{use:24} {level}")
    print(f"data docs                {checked.docs / 'index.html'}")


def _sorted(verdict: Verdict) -> list[CheckResult]:
    order = ("block", "warn", "pass", "report")
    return sorted(verdict.checks, key=lambda check: (order.index(check.level.value), check.environment, check.name))


def _thresholds(check: CheckResult) -> str:
    bounds = (("warn", check.warn_threshold), ("block", check.block_threshold))
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None) or "–"


def _advice(check: CheckResult) -> str:
    from rich.markup import escape

    bad = check.level.value in ("block", "warn") and check.remedy
    return escape(f"{check.message}; {check.remedy}" if bad else check.message)
