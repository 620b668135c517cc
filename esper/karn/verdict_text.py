"""A verdict in words: the rows of its table and the one line that commands show, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.karn.versions import Version
from esper.leyline.errors import EsperError
from esper.leyline.verdict import CheckResult, Level, Override, Use, Verdict

LEVEL_ORDER = (Level.BLOCK, Level.WARN, Level.PASS, Level.REPORT)
FIRED = (Level.BLOCK, Level.WARN)
USE_WORDS = {
    Use.IMITATION: "imitation",
    Use.OFFLINE_RL: "offline RL",
    Use.OFF_POLICY_EVALUATION: "off-policy evaluation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check, every field ready to show.

    Attributes:
        level: pass, warn, block or report.
        name: The check's name, as `--rows` takes it.
        environment: The environment, or `all`.
        value: What was measured, an en dash where nothing could be.
        thresholds: What it was held against, one limit a line, an en dash without any.
        message: What was found.
        remedy: What to do; empty unless the check fired.
        uses: The uses that its level counts for, in words; empty where it counts for all.
    """

    level: str
    name: str
    environment: str
    value: str
    thresholds: str
    message: str
    remedy: str
    uses: str


def short_number(value: float) -> str:
    """Return a number with three significant digits and a proper minus sign."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", "−")


def sorted_checks(verdict: Verdict) -> list[CheckResult]:
    """Return the checks, worst first."""
    return sorted(verdict.checks, key=lambda check: (LEVEL_ORDER.index(check.level), check.name, check.environment))


def check_row(check: CheckResult) -> CheckRow:
    """Return a check as text."""
    limits = (("warn", check.warn_threshold), ("block", check.block_threshold))
    lines = [f"{word} {short_number(limit)}" for word, limit in limits if limit is not None]
    some = len(check.uses) < len(Use) and check.level in FIRED
    return CheckRow(
        level=check.level.value,
        name=check.name,
        environment=check.environment,
        value="–" if check.value is None else short_number(check.value),
        thresholds="\n".join(lines) or "–",
        message=check.message,
        remedy=check.remedy if check.level in FIRED else "",
        uses=", ".join(use.value for use in check.uses) if some else "",
    )


def levels(verdict: Verdict) -> dict[str, str]:
    """Return the level of every use."""
    return {use.value: verdict.level(use).value for use in Use}


def blocked_uses(verdict: Verdict) -> list[Use]:
    """Return the uses that the verdict blocks."""
    return [use for use in Use if verdict.level(use) is Level.BLOCK]


def verdict_line(version: Version, *, only_bad: bool = False) -> str | None:
    """Return one line that says what a version is fit for.

    Args:
        version: The sealed version.
        only_bad: Return None unless it is blocked for a use, was never checked, or its verdict cannot be read.
    """
    try:
        verdict = version.verdict()
    except EsperError as error:
        return f"health of {version.ref}: {str(error).splitlines()[0]}"
    if verdict is None:
        return f"health of {version.ref}: never checked; run `esper health {version.ref}`"
    if only_bad and not blocked_uses(verdict):
        return None
    told = ", ".join(f"{use} {level}" for use, level in levels(verdict).items())
    return f"health of {version.ref}: {told}"


def override_lines(overrides: Sequence[Override]) -> list[str]:
    """Return a sentence for every distinct override: repeated runs with the same reason are one."""
    told: dict[str, None] = {}
    for item in overrides:
        verdict = "never checked" if item.level is None else f"verdict {item.level.value}"
        told[
            f"{item.dataset}@{item.version} was used for {item.use.value} by {item.by} against its health "
            f"({verdict}): {item.reason}"
        ] = None
    return list(told)
