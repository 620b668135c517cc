"""A verdict as a table: what `esper health` prints."""

from __future__ import annotations

from dataclasses import dataclass

from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from quality.thresholds import load_thresholds

_RANK = {Level.BLOCK: 0, Level.WARN: 1, Level.PASS: 2, Level.REPORT: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One line of the table, every field ready to print.

    Attributes:
        level: pass, warn, block or report.
        check: The check's name.
        environment: The environment, or `all`.
        value: The measured number, `-` where nothing could be measured.
        threshold: What it was held against, `-` for a report.
        message: What was found.
        remedy: What to do, empty unless the check fired.
    """

    level: str
    check: str
    environment: str
    value: str
    threshold: str
    message: str
    remedy: str


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _threshold(result: CheckResult) -> str:
    known = load_thresholds().get(result.name)
    sign = ">" if known is None or known.bad == "high" else "<"
    limits = (("warn", result.warn_threshold), ("block", result.block_threshold))
    return ", ".join(f"{name} {sign} {limit:g}" for name, limit in limits if limit is not None) or "-"


def rows(verdict: Verdict, *, reports: bool = True) -> list[SummaryRow]:
    """Return the table of a verdict: what blocks first, then what warns, passes and is reported.

    Args:
        verdict: The verdict.
        reports: Whether to include what is reported only.
    """
    kept = [result for result in verdict.checks if reports or result.level is not Level.REPORT]
    return [
        SummaryRow(
            level=result.level.value,
            check=result.name,
            environment=result.environment,
            value=_number(result.value),
            threshold=_threshold(result),
            message=result.message,
            remedy=result.remedy,
        )
        for result in sorted(kept, key=lambda result: _RANK[result.level])
    ]


def uses(verdict: Verdict) -> dict[Use, Level]:
    """Return the level of the dataset for each use."""
    return {use: verdict.level(use) for use in Use}
