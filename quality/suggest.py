"""The remedy: which cells and branchings would lift the weakest checks of a dataset most, as a matrix.

`esper datagen --matrix FILE --dataset NAME` takes what `to_toml` returns; what the dataset holds is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.karn.catalogue import connect
from esper.karn.store import Version
from esper.leyline.errors import HealthError
from esper.leyline.matrix import MatrixSpec
from esper.leyline.verdict import CheckResult, Level, Verdict
from quality.suggest_branches import Branches, branch_candidates
from quality.suggest_cells import Cells, Option, cell_options
from quality.suggest_data import Findings, gather
from quality.suggest_effects import FAILING, PER_ENVIRONMENT, PROXIES, SHARES, Aim, Choice, goals_of, model_of

MAX_EPISODES = 64

EPOCH_PRICE = 1e-5
"""What a host epoch costs against progress: between plans that bring the same, the cheaper one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a remedy is expected to do to one check.

    Attributes:
        check: The check.
        environment: Where it was decided.
        level: Its level now.
        now: Its value now.
        expected: Its value after the remedy, None where no estimate is made.
        threshold: The threshold that it failed, if any.
        why: What of the remedy acts on it.
    """

    check: str
    environment: str
    level: Level
    now: float | None
    expected: float | None
    threshold: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A matrix that extends a dataset, and what is expected of it.

    Attributes:
        matrix: What to generate.
        table: The checks that the matrix acts on, the failing ones first.
        dataset: The version that it extends, NAME@n.
        episodes: New episodes, branches included.
        branches: How many of them are branches.
        epochs: Host epochs that they cost, at most.
        notes: What was left out, and why.
    """

    matrix: MatrixSpec
    table: tuple[Expected, ...]
    dataset: str
    episodes: int
    branches: int
    epochs: int
    notes: tuple[str, ...]


def suggest(version: Version, verdict: Verdict, *, max_episodes: int = MAX_EPISODES) -> Suggestion:
    """Return the matrix that is expected to lift the weakest checks of a version most per host epoch.

    Failing checks count most, blocked ones more than warnings; where none fails, the weakest values are raised.
    Checks that more data cannot mend (an engine's fault, a leak) are named in the notes.

    Args:
        version: A sealed version.
        verdict: Its verdict.
        max_episodes: Most episodes, branches included.

    Raises:
        HealthError: The verdict is another version's, the dataset cannot be extended, or nothing would help.
    """
    if verdict.digest != version.manifest.digest:
        raise HealthError(f"the verdict is not that of {version.ref}\n  check it first: esper health {version.ref}")
    connection = connect(version)
    try:
        findings = gather(connection, version)
    finally:
        connection.close()
    model = model_of(findings, verdict.checks)
    aim = Aim(model=model, goals=goals_of(verdict.checks, model))
    name = f"{version.name[:28]}-remedy-{version.number}"
    plan = _best_plan(findings, aim, name, max_episodes)
    if not plan.choice.episodes:
        raise HealthError(f"no episode is expected to lift a check of {version.ref}\n  max_episodes: {max_episodes}")
    matrix = MatrixSpec(name=name, cells=plan.cells.cells(), branches=tuple(plan.branches.chosen))
    acts = {environment: plan.cells.options[environment].why for environment in plan.cells.chosen}
    return Suggestion(
        matrix=matrix,
        table=_table(verdict.checks, aim, plan.choice, acts, len(plan.branches.chosen)),
        dataset=version.ref,
        episodes=plan.choice.episodes,
        branches=len(plan.branches.chosen),
        epochs=plan.choice.epochs,
        notes=_notes(verdict.checks, aim, findings.left_out),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """One way to spend the budget."""

    choice: Choice
    cells: Cells
    branches: Branches
    worth: float


def _best_plan(findings: Findings, aim: Aim, name: str, max_episodes: int) -> _Plan:
    """Return the best plan over the cells that each environment could have, one environment after the other."""
    candidates = branch_candidates(findings)

    def plan_with(options: Mapping[str, Option]) -> _Plan:
        cells, branches = Cells(findings, aim, name, options), Branches(findings, aim, candidates)
        choice = _spend(aim.begin(findings), cells, branches, max_episodes)
        gained = float(aim.lift(aim.begin(findings), (choice.sums - aim.model.base)[None])[0])
        return _Plan(choice, cells, branches, gained - EPOCH_PRICE * choice.epochs)

    best = plan_with({})
    for environment in findings.sites:
        others = best.cells.options
        for option in cell_options(findings, environment):
            best = max(best, plan_with({**others, environment: option}), key=lambda plan: plan.worth)
    return best


def _spend(choice: Choice, cells: Cells, branches: Branches, max_episodes: int) -> Choice:
    """Take what brings most per host epoch until the budget is spent or nothing brings anything."""
    while choice.episodes < max_episodes:
        cell, branch = cells.best(choice, max_episodes - choice.episodes), branches.best(choice)
        if cell is not None and cell.rate > 0 and (branch is None or cell.rate >= branch.rate):
            cells.take(choice, cell)
        elif branch is not None and branch.rate > 0:
            branches.take(choice, branch)
        else:
            break
    return choice


def _table(
    checks: Sequence[CheckResult], aim: Aim, choice: Choice, acts: Mapping[str, str], num_branches: int
) -> tuple[Expected, ...]:
    before, after = aim.model.values(aim.model.base), aim.model.values(choice.sums)
    goals = {goal.check for goal in aim.goals}
    parts = [f"{environment}: {why}" for environment, why in sorted(acts.items())]
    parts += [f"{num_branches} branchings"] if num_branches else []
    why = "; ".join(parts)
    rows = []
    for check in checks:
        whole = check.environment == "all"
        proxies = any(check.name.startswith(beginning) for beginning in PROXIES) and check.level in FAILING
        if check.value is None or not (check.name in goals or proxies):
            continue
        if not whole and check.level not in FAILING:
            continue
        predicted = check.name in goals and (whole or check.name in PER_ENVIRONMENT)
        moved = after[check.name] - before[check.name] if predicted else 0.0
        expected = check.value + moved if predicted else None
        if expected is not None and check.name in SHARES:
            expected = min(max(expected, 0.0), 1.0)
        limit = check.block_threshold if check.level is Level.BLOCK else check.warn_threshold
        row = Expected(
            check=check.name,
            environment=check.environment,
            level=check.level,
            now=check.value,
            expected=expected,
            threshold=limit,
            why=why,
        )
        if row not in rows:
            rows.append(row)
    order = (Level.BLOCK, Level.WARN, Level.PASS, Level.REPORT)
    return tuple(sorted(rows, key=lambda row: (order.index(row.level), row.check, row.environment)))


def _notes(checks: Sequence[CheckResult], aim: Aim, left_out: Mapping[str, str]) -> tuple[str, ...]:
    goals = {goal.check for goal in aim.goals}
    beyond = {
        check.name
        for check in checks
        if check.level in FAILING
        and check.name not in goals
        and not any(check.name.startswith(beginning) for beginning in PROXIES)
    }
    notes = [f"more data does not mend {name}; see its remedy" for name in sorted(beyond)]
    return (*notes, *(f"{name} is left out: {reason}" for name, reason in sorted(left_out.items())))


def to_toml(suggestion: Suggestion) -> str:
    """Return the matrix as TOML, with the expectations as comments."""
    lines = [
        f"# Suggested for {suggestion.dataset}: {suggestion.episodes} episodes ({suggestion.branches} branches)",
        f"# and at most {suggestion.epochs:,} host epochs.",
        *(f"# {line}" for line in table_lines(suggestion)),
        *(f"# note: {note}" for note in suggestion.notes),
        f"# esper datagen --matrix THIS_FILE --dataset {suggestion.dataset.partition('@')[0]}",
        f"name = {_value(suggestion.matrix.name)}",
    ]
    for cell in suggestion.matrix.cells:
        lines += ["", "[[cells]]", *_pairs(cell.model_dump(mode="json", exclude_none=True))]
    for branch in suggestion.matrix.branches:
        lines += ["", "[[branches]]", *_pairs(branch.model_dump(mode="json", exclude_none=True))]
    return "\n".join(lines) + "\n"


def table_lines(suggestion: Suggestion) -> list[str]:
    """Return the table of expectations as aligned lines of text."""
    cells: list[tuple[str, ...]] = [("level", "check", "environment", "now", "expected", "threshold")]
    cells += [
        (row.level.value, row.check, row.environment, *(_number(v) for v in (row.now, row.expected, row.threshold)))
        for row in suggestion.table
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _pairs(fields: Mapping[str, object]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in fields.items()]


def _value(value: object) -> str:
    """The TOML of a string, a number, a boolean, a list or an inline table."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_pairs({str(key): item for key, item in value.items()})) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value)  # TOML's strings, numbers and booleans of these specifications are JSON's
