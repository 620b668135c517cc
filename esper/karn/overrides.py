"""Uses of a version against its verdict: kept beside it in `versions/n.overrides.jsonl`, one JSON object a line."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from pydantic import ValidationError

from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.verdict import Level, Override, Use

MAX_REASON = 1000


def check_reason(reason: str) -> str:
    """Return a reason without surrounding space; SpecError where it says nothing or too much."""
    text = " ".join(reason.split())
    if len(text) < 3 or not any(letter.isalpha() for letter in text):
        raise SpecError(
            f"the reason for overriding the verdict is {reason!r}\n"
            "  expected: why these data may be used all the same; it is printed in every later report"
        )
    if len(text) > MAX_REASON:
        raise SpecError(f"the reason has {len(text)} characters\n  expected: at most {MAX_REASON}")
    return text


def record_override(version: Version, use: Use, level: Level | None, reason: str, by: str) -> Override:
    """Append an override to those of a version and return it.

    Raises:
        SpecError: The reason says nothing.
        StoreError: The file cannot be written.
    """
    override = Override(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        use=use,
        level=level,
        reason=check_reason(reason),
        by=by,
        at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    path = _path(version.root, version.number)
    try:
        with path.open("ab") as file:  # one short write at the end: learners on several workers do not mix
            file.write(override.model_dump_json().encode() + b"\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    return override


def overrides_of(version: Version) -> list[Override]:
    """Return the overrides of a version and of the dataset's versions before it, oldest version first.

    A version holds what the earlier ones held, and what was learned from those; so does what is said about it.

    Raises:
        IntegrityError: A line is damaged, or belongs to other data.
        StoreError: A file cannot be read.
    """
    found = []
    for number in range(1, version.number + 1):
        path = _path(version.root, number)
        if path.is_file():
            found += _read(path, version.name, number)
    return found


def _path(root: Path, number: int) -> Path:
    return root / "versions" / f"{number}.overrides.jsonl"


def _read(path: Path, name: str, number: int) -> list[Override]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        overrides = [Override.model_validate_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}\n  restore it from a copy") from None
    if any((item.dataset, item.version) != (name, number) for item in overrides):
        raise IntegrityError(f"{path} holds overrides of other data\n  expected: of {name}@{number} alone")
    return overrides
