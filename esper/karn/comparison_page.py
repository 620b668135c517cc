"""The comparison as a page of Markdown: tables, what was chosen how, findings, controls."""

from __future__ import annotations

from collections.abc import Sequence

from esper.karn.comparison_table import environments, findings, number, tables_of
from esper.leyline.comparison import Evaluation, Interval, PolicySelection


def comparison_page(evaluation: Evaluation) -> str:
    """Return the page of an evaluation: per environment its arms, algorithms and members, and the findings."""
    verdict = "never checked" if evaluation.verdict is None else evaluation.verdict.value
    parts = [
        f"# Policies from {evaluation.dataset}@{evaluation.version} against every control",
        f"Offline RL verdict of the data: {verdict}. Evaluated {evaluation.created_at}. Returns are in units of the "
        "reward's scale, gains in points of test accuracy; differences are paired by environment seed. A mean stands "
        "above the ends of its 95 % interval. Policies of one algorithm are one row; all are in `evaluation.json`.",
    ]
    for environment in environments(evaluation):
        parts += _environment(evaluation, environment)
    parts += ["## Controls", *_controls(evaluation)]
    return "\n\n".join(parts) + "\n"


def selection_page(selection: PolicySelection) -> str:
    """Return the part of a page that tells how a policy was selected: predictions, live returns, winner."""
    rows = []
    for trial in selection.candidates:
        live = "not tried" if trial.live_return is None else number(trial.live_return, 2, signed=True)
        where = "<br>".join(f"{name} {_interval(found)}" for name, found in trial.live_by_environment.items())
        name = f"**{trial.policy}**" if trial.policy == selection.winner else trial.policy
        rows.append([name, number(trial.predicted_return, 2, signed=True), live, where or "–"])
    tried = sum(trial.live_return is not None for trial in selection.candidates)
    lines = [
        f"# Selection from {len(selection.candidates)} policies on {selection.dataset}@{selection.version}",
        f"Ranked by off-policy evaluation; the first {tried} met live on {selection.num_selection_seeds} selection "
        f"seeds; {selection.winner} won and alone is reported on held-out seeds.",
        markdown_table(("policy", "predicted return", "live return on selection seeds", "by environment"), rows),
    ]
    return "\n\n".join(lines) + "\n"


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; lines within a cell are kept."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (names, *rows)]
    marks = ["---", *["---:"] * (len(names) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], marks, *cells[1:]))


def _environment(evaluation: Evaluation, environment: str) -> list[str]:
    parts = [f"## {environment}"]
    for table in tables_of(evaluation, environment):
        parts += [f"{table.title}.", markdown_table(table.headings, table.rows)]
    told = findings(evaluation, environment)
    return [*parts, "\n".join(f"- {line}" for line in told)] if told else parts


def _controls(evaluation: Evaluation) -> list[str]:
    if not evaluation.controls:
        return ["None was asked for."]
    rows = [
        [
            f"{control.environment}: {control.name}",
            number(control.value, 2),
            f"{control.low:g} to {control.high:g}",
            "passed" if control.passed else "**FAILED**",
        ]
        for control in evaluation.controls
    ]
    return [markdown_table(("control", "value", "expected", ""), rows)]


def _interval(interval: Interval) -> str:
    mean, low, high = (number(value, 2, signed=True) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"
