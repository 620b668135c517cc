"""An imitation policy's result as rows of text: the terminal and the model card show the same numbers."""

from __future__ import annotations

import math

from esper.karn.comparison_table import interval_text, number
from esper.leyline.imitation import ActionClass, Agreement, Confusion, LiveComparison

CONFUSION_HEADINGS = ("decided", *(f"as {code.name}" for code in ActionClass), "all", "recall %")
LIVE_HEADINGS = ("", "heuristic", "imitation", "imitation − heuristic")
DISAGREEMENT_HEADINGS = ("both asked along", "decisions", "forced", "disagree", *(code.name for code in ActionClass))


def percent(share: float) -> str:
    """Return a share in percent with one digit, a dash where it is undefined."""
    return "–" if math.isnan(share) else number(100 * share)


def confusion_rows(confusion: Confusion) -> list[list[str]]:
    """Return one row per class that was decided, in the order of CONFUSION_HEADINGS, then one of precisions."""
    rows = [
        [code.name, *(str(count) for count in confusion.counts[code]), str(confusion.num_right(code)),
         percent(confusion.recall(code))]
        for code in ActionClass
    ]  # fmt: skip
    precisions = [percent(confusion.precision(code)) for code in ActionClass]
    return [*rows, ["precision %", *precisions, str(confusion.total), ""]]


def accuracy_line(name: str, confusion: Confusion) -> str:
    """Return one line with the accuracies over some decisions."""
    if not confusion.total:
        return f"{name}: none, no environment seed was held out (that takes four)"
    wait = percent(confusion.num_right(ActionClass.WAIT) / confusion.total)
    num_classes = sum(confusion.num_right(code) > 0 for code in ActionClass)
    return (
        f"{name}: accuracy {percent(confusion.accuracy)} %, balanced accuracy "
        f"{percent(confusion.balanced_accuracy)} % (mean recall of {num_classes} classes) over {confusion.total} "
        f"decisions, {wait} % of them WAIT"
    )


def live_title(live: LiveComparison) -> str:
    """Return the heading of an environment's live comparison."""
    left_out = f", {live.num_left_out} left out" if live.num_left_out else ""
    method = live.test_difference.method
    return f"{live.environment}: {live.num_env_seeds} selection environment seeds{left_out}, 95 % intervals ({method})"


def live_rows(live: LiveComparison) -> list[list[str]]:
    """Return test accuracy and return of both and of their paired difference, in the order of LIVE_HEADINGS."""
    test = (live.heuristic_test_percent, live.imitation_test_percent)
    returns = (live.heuristic_return, live.imitation_return)
    return [
        ["test %", *(interval_text(item, 1, signed=False) for item in test), interval_text(live.test_difference, 1)],
        ["return", *(interval_text(item, 2) for item in returns), interval_text(live.return_difference, 2)],
    ]


def disagreement_rows(live: LiveComparison) -> list[list[str]]:
    """Return one row per kind of trajectory, in the order of DISAGREEMENT_HEADINGS.

    Under a class stands in how many of the heuristic's decisions of that class the policy decided otherwise. Choices of
    the same class that differ in slot, blueprint or lever stand in a line of their own.
    """
    return [
        _disagreements("the heuristic's episodes", live.on_heuristic),
        _disagreements("its own episodes", live.on_imitation),
    ]


def _disagreements(name: str, agreement: Agreement) -> list[str]:
    choices = agreement.choices
    other = f"\n+{agreement.num_other_action} in slot or levers" if agreement.num_other_action else ""
    return [
        name,
        str(choices.total + agreement.num_forced),
        str(agreement.num_forced),
        f"{choices.num_wrong}{other}",
        *(f"{choices.num_wrong_of(code)} of {choices.num_right(code)}" for code in ActionClass),
    ]
