"""Vacuum: files that nothing names any more are removed, never one of a sealed version or of the current tables.

What compaction replaced counts from when it was replaced, what a killed writer left from when it was written: a reader,
a sealing or a running writer has the whole retention to finish.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from esper.karn import delta
from esper.karn.store import Dataset
from esper.leyline.errors import SpecError
from esper.leyline.schema import SCHEMAS

RETAIN_HOURS = 24


@dataclass(frozen=True, slots=True)
class Unused:
    """A file that neither the current tables nor a sealed version names.

    Attributes:
        name: Relative to the dataset.
        size: Bytes.
        why: `replaced` (compaction put its rows into another file) or `orphan` (it belongs to no commit).
        is_old: Whether the retention has passed, so that vacuum removes it.
    """

    name: str
    size: int
    why: str
    is_old: bool


def unused_files(dataset: Dataset, *, retain_hours: float = RETAIN_HOURS) -> list[Unused]:
    """Return the files that nothing names any more, by name.

    Args:
        dataset: Whose.
        retain_hours: How long a file is kept, 0 or more; 0 is safe only while nobody else uses the dataset.

    Raises:
        SpecError: A negative retention.
        StoreError: The store cannot be read, or nothing was committed.
        IntegrityError: A manifest is damaged, so that what it seals is not known.
    """
    if not retain_hours >= 0:
        raise SpecError(f"a retention of {retain_hours:g} hours\n  expected: 0 or more")
    before_s = time.time() - 3600 * retain_hours
    # Files first, what names them last: whatever was committed or sealed in between is then known to be named.
    listed = [file for table in SCHEMAS for file in dataset.place.files(table)]
    replaced, old = _replaced(dataset, 0), _replaced(dataset, retain_hours)
    named = {name for _, names in delta.current_files(dataset.place).values() for name in names}
    named |= {entry.path for version in dataset.versions() for entry in version.manifest.files}
    found = []
    for file in listed:
        if file.name in named or not file.name.endswith(".parquet") or f"/{delta.LOG}/" in file.name:
            continue
        is_replaced = file.name in replaced
        is_old = file.name in old if is_replaced else file.modified_s <= before_s
        found.append(Unused(file.name, file.size, "replaced" if is_replaced else "orphan", is_old))
    return sorted(found, key=lambda file: file.name)


def vacuum(dataset: Dataset, *, retain_hours: float = RETAIN_HOURS) -> list[Unused]:
    """Remove the unused files that are older than the retention and return them; raises as `unused_files`."""
    return remove(dataset, unused_files(dataset, retain_hours=retain_hours))


def remove(dataset: Dataset, unused: Sequence[Unused]) -> list[Unused]:
    """Remove those of the unused files that are old, and return them (StoreError where one cannot be)."""
    removed = [file for file in unused if file.is_old]
    for file in removed:
        dataset.place.remove(file.name)
    return removed


def _replaced(dataset: Dataset, retain_hours: float) -> set[str]:
    """The files that compactions replaced longer ago than the retention, as far as the tables' logs remember them."""
    names: set[str] = set()
    for table in SCHEMAS:
        where = dataset.place.child(table)
        if not delta.exists(where):
            continue
        with delta.delta_errors(where):
            opened = delta.open_table(where)
            listed = opened.vacuum(math.ceil(retain_hours), dry_run=True, enforce_retention_duration=False)
        names.update(f"{table}/{name}" for name in listed)
    return names
