"""The comparison as tables of text: the terminal, the page and the report show the same numbers in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.leyline.comparison import AlgorithmResult, ArmResult, Evaluation, Interval

REFERENCES = ("never-act", "heuristic", "best-fixed")
"""The arms to which every arm is compared, in the order of the columns; a bandit, if there is one, comes after them."""

BANDIT = "bandit"

HEADINGS = (
    "arm",
    "test %",
    "gain over never-act",
    "gain over heuristic",
    "gain over best-fixed",
    "return",
    "return over heuristic",
    "return over best-fixed",
    "params added",
    "train GFLOP",
)
"""Headings of a row. Never-act's return is 0, so the return is also the return over never-act."""


POOLED_HEADINGS = (
    "arm",
    "test %",
    "gain over never-act",
    "gain over best-fixed",
    "return",
    "IQM return",
    "return over heuristic",
    "return over best-fixed",
    "return over bandit",
    "IQM over best-fixed",
    "predicted return",
    "size, GFLOP",
)
"""Headings of the table of algorithms; never-act's return is 0."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text. A cell may have several lines; the first column is what a row is about."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]


def tables_of(evaluation: Evaluation, environment: str) -> list[TextTable]:
    """Return the tables of one environment: arms, then algorithms and members where there are any.

    The policies of an algorithm with several controller seeds stand as that algorithm alone.
    """
    known = arms_of(evaluation, environment)
    single = {arm.arm for arm in single_arms_of(evaluation, environment)}
    rows = [row for arm, row in zip(known, full_table(evaluation, environment)) if arm.arm in single]
    found = [TextTable(title(evaluation, environment), headings(evaluation, environment), rows)]
    if algorithms_of(evaluation, environment):
        name, pooled = algorithm_title(evaluation, environment), algorithm_table(evaluation, environment)
        found.append(TextTable(name, POOLED_HEADINGS, pooled))
    if environment in evaluation.families:
        name = f"{environment}: mean return by member, and in brackets the difference to the best fixed schedule"
        members = member_table(evaluation, environment)
        found.append(TextTable(name, member_headings(evaluation, environment), members))
    return found


def headings(evaluation: Evaluation, environment: str) -> tuple[str, ...]:
    """Return the headings of an environment's rows: one more where there is a bandit."""
    more = (f"return over {BANDIT}",) if _has_bandit(evaluation, environment) else ()
    return (*HEADINGS[:8], *more, *HEADINGS[8:])


def algorithms_of(evaluation: Evaluation, environment: str) -> list[AlgorithmResult]:
    """Return the algorithms of one environment, in the evaluation's order."""
    return [result for result in evaluation.algorithms if result.environment == environment]


def algorithm_table(evaluation: Evaluation, environment: str) -> list[list[str]]:
    """Return one row of text per algorithm with several policies, in the order of POOLED_HEADINGS."""
    return [_algorithm_row(result) for result in algorithms_of(evaluation, environment)]


def algorithm_title(evaluation: Evaluation, environment: str) -> str:
    """Return the heading of the table of algorithms: what its intervals are over."""
    first = algorithms_of(evaluation, environment)[0].mean_return
    return (
        f"{environment}: algorithms, {first.num_controller_seeds} controller seeds on {first.num_env_seeds} "
        f"environment seeds, both drawn anew (95 % {first.method})"
    )


def member_headings(evaluation: Evaluation, family: str) -> tuple[str, ...]:
    """Return the headings of the table of a family's members: their names without the family's."""
    return ("arm", *(name.removeprefix(f"{family}-") for name in evaluation.families[family]))


def member_table(evaluation: Evaluation, family: str) -> list[list[str]]:
    """Return one row per control, single policy and algorithm: the mean return on each member of a family.

    Below it stands the difference to the best fixed schedule, which is one schedule for the whole family.
    """
    members = evaluation.families[family]
    arms = {(arm.environment, arm.arm): arm for arm in evaluation.members}
    algorithms = {(result.environment, result.algorithm): result for result in evaluation.algorithms}
    rows = []
    for name in row_names(evaluation, family):
        found = [algorithms.get((member, name)) or arms[member, name] for member in members]
        rows.append([name, *(_member_cell(result) for result in found)])
    return rows


def row_names(evaluation: Evaluation, environment: str) -> list[str]:
    """Return the arms in order; the policies of an algorithm with several seeds stand as that algorithm."""
    groups = {name: result for result in algorithms_of(evaluation, environment) for name in result.policies}
    names = [groups[arm.arm].algorithm if arm.arm in groups else arm.arm for arm in arms_of(evaluation, environment)]
    return list(dict.fromkeys(names))


def environments(evaluation: Evaluation) -> list[str]:
    """Return the environments of an evaluation, in its order."""
    return list(dict.fromkeys(arm.environment for arm in evaluation.arms))


def arms_of(evaluation: Evaluation, environment: str) -> list[ArmResult]:
    """Return the arms of one environment, in the evaluation's order."""
    return [arm for arm in evaluation.arms if arm.environment == environment]


def single_arms_of(evaluation: Evaluation, environment: str) -> list[ArmResult]:
    """Return the arms that are not policies of an algorithm with several controller seeds."""
    grouped = {name for found in algorithms_of(evaluation, environment) for name in found.policies}
    return [arm for arm in arms_of(evaluation, environment) if arm.arm not in grouped]


def drawn_arms_of(evaluation: Evaluation, environment: str) -> list[ArmResult]:
    """Return what figures show: single arms, and each algorithm with several controller seeds as one arm."""
    arms = {arm.arm: arm for arm in arms_of(evaluation, environment)}
    pooled = []
    for found in algorithms_of(evaluation, environment):
        params = [arms[name].seed_params for name in found.policies]
        shared = {name: getattr(found, name) for name in type(found).model_fields if name in ArmResult.model_fields}
        name = f"{found.algorithm} ×{len(params)}"
        pooled.append(ArmResult(**shared, arm=name, group="learned", seed_params=sum(params) / len(params)))
    return [*single_arms_of(evaluation, environment), *pooled]


def comparison_table(evaluation: Evaluation, environment: str) -> list[list[str]]:
    """Return one row of text per arm of an environment, in the order of HEADINGS.

    A cell with an interval has two lines: the mean, then the interval's ends. Under the name of an arm stands how many
    of its episodes diverged and were rolled back, if any.
    """
    return [_row(arm) for arm in arms_of(evaluation, environment)]


def full_table(evaluation: Evaluation, environment: str) -> list[list[str]]:
    """Return the rows in the order of `headings`, the bandit's column included."""
    if not _has_bandit(evaluation, environment):
        return comparison_table(evaluation, environment)
    arms = arms_of(evaluation, environment)
    cells = [_versus(arm.return_over.get(BANDIT), 2) for arm in arms]
    return [[*row[:8], cell, *row[8:]] for row, cell in zip(comparison_table(evaluation, environment), cells)]


def title(evaluation: Evaluation, environment: str) -> str:
    """Return the heading of an environment's table: seeds, interval, and what the best fixed schedule is."""
    first = arms_of(evaluation, environment)[0].test_accuracy_percent
    members = evaluation.families.get(environment, ())
    mix = f" x {len(members)} members, pooled by seed" if members else ""
    text = f"{environment}: {first.num_env_seeds} held-out environment seeds{mix}, 95 % intervals ({first.method})"
    for best in evaluation.best_fixed:
        if best.environment == environment:
            text += (
                f"; best fixed: {best.description}, the best of {best.num_candidates} "
                f"on {best.num_selection_seeds} selection seeds"
            )
    for bandit in evaluation.bandits:
        if bandit.environment == environment:
            text += f"; bandit: {bandit.description}, {bandit.num_pulls} pulls of {bandit.num_arms} arms"
    return text


def number(value: float, digits: int = 1, *, signed: bool = False) -> str:
    """Return a number with a proper minus sign; a rounded zero has no sign."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval_text(interval: Interval, digits: int = 1, *, signed: bool = True) -> str:
    """Return two lines: the mean, then the ends of the interval."""
    low, high = (number(value, digits, signed=signed) for value in (interval.low, interval.high))
    return f"{number(interval.mean, digits, signed=signed)}\n{low} … {high}"


def findings(evaluation: Evaluation, environment: str) -> list[str]:
    """Return one sentence per learned policy: over which controls its return is higher, lower, or undecided.

    An algorithm with several controller seeds has one sentence for all of them.
    """
    results = algorithms_of(evaluation, environment)
    single = [arm for arm in single_arms_of(evaluation, environment) if arm.group == "learned"]
    pooled = [_finding(f"{found.algorithm} ({len(found.policies)} seeds)", found.return_over) for found in results]
    return [*pooled, *(_finding(arm.arm, arm.return_over) for arm in single)]


def _row(arm: ArmResult) -> list[str]:
    gains = [_versus(arm.gain_over.get(name), 1) for name in REFERENCES]
    returns = [_versus(arm.return_over.get(name), 2) for name in REFERENCES[1:]]
    mishaps = ((arm.num_diverged, "diverged"), (arm.num_rolled_back, "rolled back"))
    return [
        "\n".join([arm.arm, *(f"{count} {what}" for count, what in mishaps if count)]),
        interval_text(arm.test_accuracy_percent, 1, signed=False),
        *gains,
        interval_text(arm.mean_return, 2),
        *returns,
        f"{arm.seed_params:,.0f}\n×{arm.growth_factor:.2f}",
        f"{arm.train_gflops:.3g}",
    ]


def _versus(interval: Interval | None, digits: int) -> str:
    return "–" if interval is None else interval_text(interval, digits)


def _algorithm_row(result: AlgorithmResult) -> list[str]:
    over = result.return_over
    mishaps = ((result.num_diverged, "diverged"), (result.num_rolled_back, "rolled back"))
    name = f"{result.algorithm} ×{len(result.policies)}"
    predicted = result.predicted_return
    return [
        "\n".join([name, *(f"{count} {what}" for count, what in mishaps if count)]),
        interval_text(result.test_accuracy_percent, 1, signed=False),
        *(_versus(result.gain_over.get(reference), 1) for reference in ("never-act", "best-fixed")),
        interval_text(result.mean_return, 2),
        interval_text(result.iqm_return, 2),
        *(_versus(over.get(reference), 2) for reference in (*REFERENCES[1:], BANDIT)),
        _versus(result.iqm_return_over.get("best-fixed"), 2),
        "–" if predicted is None else number(predicted, 2, signed=True),
        f"×{result.growth_factor:.2f}\n{result.train_gflops:.3g}",
    ]


def _member_cell(result: ArmResult | AlgorithmResult) -> str:
    mean = number(result.mean_return.mean, 2, signed=True)
    over = result.return_over.get("best-fixed")
    return mean if over is None else f"{mean}\n({number(over.mean, 2, signed=True)})"


def _has_bandit(evaluation: Evaluation, environment: str) -> bool:
    return any(bandit.environment == environment for bandit in evaluation.bandits)


def _finding(name: str, return_over: Mapping[str, Interval]) -> str:
    verdicts: dict[str, list[str]] = {"higher than": [], "lower than": [], "not distinguishable from": []}
    for reference in (*REFERENCES, BANDIT):
        interval = return_over.get(reference)
        if interval is None:
            continue
        if interval.low > 0:
            word = "higher than"
        elif interval.high < 0:
            word = "lower than"
        else:
            word = "not distinguishable from"
        verdicts[word].append(f"{reference} ({number(interval.mean, 2, signed=True)})")
    parts = [f"{word} {_listed(names)}" for word, names in verdicts.items() if names]
    return f"{name}: its return is {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
