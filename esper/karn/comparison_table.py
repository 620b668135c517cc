"""The comparison as rows of text: the terminal and the report show the same numbers in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from esper.leyline.comparison import ArmResult, Evaluation, Interval

REFERENCES = ("never-act", "heuristic", "best-fixed")
"""The arms to which every arm is compared, in the order of the columns."""

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


def environments(evaluation: Evaluation) -> list[str]:
    """Return the environments of an evaluation, in its order."""
    return list(dict.fromkeys(arm.environment for arm in evaluation.arms))


def arms_of(evaluation: Evaluation, environment: str) -> list[ArmResult]:
    """Return the arms of one environment, in the evaluation's order."""
    return [arm for arm in evaluation.arms if arm.environment == environment]


def comparison_table(evaluation: Evaluation, environment: str) -> list[list[str]]:
    """Return one row of text per arm of an environment, in the order of HEADINGS.

    A cell with an interval has two lines: the mean, then the interval's ends. Under the name of an arm stands how many
    of its episodes diverged and were rolled back, if any.
    """
    return [_row(arm) for arm in arms_of(evaluation, environment)]


def title(evaluation: Evaluation, environment: str) -> str:
    """Return the heading of an environment's table: seeds, interval, and what the best fixed schedule is."""
    first = arms_of(evaluation, environment)[0].test_accuracy_percent
    text = f"{environment}: {first.num_env_seeds} held-out environment seeds, 95 % intervals ({first.method})"
    for best in evaluation.best_fixed:
        if best.environment == environment:
            text += (
                f"; best fixed: {best.description}, the best of {best.num_candidates} "
                f"on {best.num_selection_seeds} selection seeds"
            )
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
    """Return one sentence per learned policy: over which controls its return is higher, lower, or undecided."""
    return [_finding(arm) for arm in arms_of(evaluation, environment) if arm.group == "learned"]


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


def _finding(arm: ArmResult) -> str:
    verdicts: dict[str, list[str]] = {"higher than": [], "lower than": [], "not distinguishable from": []}
    for name in REFERENCES:
        interval = arm.return_over.get(name)
        if interval is None:
            continue
        if interval.low > 0:
            word = "higher than"
        elif interval.high < 0:
            word = "lower than"
        else:
            word = "not distinguishable from"
        verdicts[word].append(f"{name} ({number(interval.mean, 2, signed=True)})")
    parts = [f"{word} {_listed(names)}" for word, names in verdicts.items() if names]
    return f"{arm.arm}: its return is {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
