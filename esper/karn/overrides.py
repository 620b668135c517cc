"""Uses of a version against its verdict: kept beside it in `versions/n.overrides.jsonl`, one JSON object a line."""

from __future__ import annotations

import datetime as dt

from pydantic import ValidationError

from esper.karn.places import MissingFileError, Place
from esper.karn.versions import VERSIONS, Version
from esper.leyline.errors import IntegrityError, SpecError
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
    version.place.append(_file_name(version.number), override.model_dump_json())
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
        found += _read(version.place, version.name, number)
    return found


def _file_name(number: int) -> str:
    return f"{VERSIONS}/{number}.overrides.jsonl"


def _read(where: Place, name: str, number: int) -> list[Override]:
    """The overrides in a version's file, none where there is no file."""
    shown = where.show(_file_name(number))
    try:
        lines = where.read_text(_file_name(number)).splitlines()
        overrides = [Override.model_validate_json(line) for line in lines if line.strip()]
    except MissingFileError:
        return []
    except ValidationError as error:
        raise IntegrityError(f"{shown} is damaged: {error}\n  restore it from a copy") from None
    if any((item.dataset, item.version) != (name, number) for item in overrides):
        raise IntegrityError(f"{shown} holds overrides of other data\n  expected: of {name}@{number} alone")
    return overrides
