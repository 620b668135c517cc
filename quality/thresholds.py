"""The thresholds of the health checks, read from the TOML beside this file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from esper.leyline.errors import unknown_name
from esper.leyline.spec_base import Spec, read_toml
from esper.leyline.verdict import Use

THRESHOLDS_FILE = Path(__file__).with_name("thresholds.toml")

SuiteName = Literal["structure", "dynamics", "value", "coverage", "behaviour", "leakage", "effect"]


class Threshold(Spec):
    """What a check is held against, and why.

    Attributes:
        suite: The suite that holds the check.
        bad: The side that fails: a value above (`high`) or below (`low`) the threshold.
        scope: Whether the level is decided over the whole dataset or for every environment.
        warn: The value that warns, if any.
        block: The value that blocks, if any.
        uses: The uses for which the level counts.
        warns_others: Whether a block is shown to the other uses as a warning.
        unit: What the value counts.
        reason: Why the threshold stands where it does.
        remedy: What to do when it fires.
    """

    suite: SuiteName
    bad: Literal["low", "high"]
    scope: Literal["dataset", "environment"]
    warn: float | None = None
    block: float | None = None
    uses: tuple[Use, ...]
    warns_others: bool = False
    unit: str
    reason: str
    remedy: str


@cache
def load_thresholds(path: Path = THRESHOLDS_FILE) -> dict[str, Threshold]:
    """Return the thresholds by check name, in file order; SpecError where the file is wrong."""
    return {name: Threshold.parse(table, f"{path}: [{name}]") for name, table in read_toml(path).items()}


def threshold_of(check: str, thresholds: dict[str, Threshold]) -> Threshold:
    """Return the threshold of a check; UnknownNameError where the file has none."""
    if check not in thresholds:
        raise unknown_name("health check", check, thresholds)
    return thresholds[check]
