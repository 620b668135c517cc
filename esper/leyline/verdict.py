"""The verdict of a health check: bound to a sealed version by its digest, one result per intended use."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from esper.leyline.spec_base import Spec


class Use(StrEnum):
    """What a dataset is to be used for."""

    IMITATION = "imitation"
    OFFLINE_RL = "offline-rl"
    OFF_POLICY_EVALUATION = "off-policy-evaluation"


class Level(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105
    WARN = "warn"
    BLOCK = "block"
    REPORT = "report"


class CheckResult(Spec):
    """One check: its value against its thresholds, and what to do about it."""

    name: str
    environment: str
    level: Level
    value: float | None
    warn_threshold: float | None = None
    block_threshold: float | None = None
    message: str
    remedy: str = ""
    uses: tuple[Use, ...] = tuple(Use)


class Verdict(Spec):
    """All checks of one sealed version."""

    dataset: str
    version: int
    digest: str
    suite_version: Literal["1"] = "1"
    checked_at: str
    checks: tuple[CheckResult, ...]

    def level(self, use: Use) -> Level:
        """Return the worst level among the checks that matter to a use."""
        levels = {check.level for check in self.checks if use in check.uses}
        for level in (Level.BLOCK, Level.WARN):
            if level in levels:
                return level
        return Level.PASS


class Override(Spec):
    """A use of a sealed version against its verdict, or without one, and the reason that was given for it.

    Attributes:
        dataset: The dataset's name.
        version: The version's number.
        digest: Its digest.
        use: What it was used for.
        level: What the verdict said of that use; None where there was no verdict.
        reason: Why it was used all the same, in the words of whoever did.
        by: What used it, such as `iql`.
        at: When, ISO 8601.
    """

    dataset: str
    version: int
    digest: str
    use: Use
    level: Level | None
    reason: str
    by: str
    at: str
