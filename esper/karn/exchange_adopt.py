"""Takes a version that lies in another folder, checked, into a store: its files as they are, then its manifest.

The manifest is written last: until then the store has no new version, and what a killed import left is taken up by the
next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, Transaction
from deltalake.transaction import AddAction

from esper.karn import delta
from esper.karn.manifest import FileEntry
from esper.karn.tables import PARTITION_COLUMN, storage_schema
from esper.karn.versions import Version, manifest_name
from esper.leyline.errors import SpecError, StoreError
from esper.leyline.schema import SCHEMAS

if TYPE_CHECKING:
    from esper.karn.store import Dataset, Store


def adopt(store: Store, version: Version, beside: Sequence[str], name: str) -> Version:
    """Return the version in the store, put there now unless an equal one is there.

    Args:
        store: Where to.
        version: A whole version in a folder of this machine.
        beside: Its files under `versions/`: manifest, verdict, splits.
        name: The dataset's name in the store.

    Raises:
        SpecError: The dataset exists and holds rows that the version does not have.
        StoreError: The store cannot be written.
    """
    dataset = store.dataset(name)
    manifest = version.manifest
    known = dataset.versions()
    for there in known:
        if (there.manifest.digest, there.manifest.matrix_id) == (manifest.digest, manifest.matrix_id):
            return there
    _check_extends(dataset, version)
    versions: dict[str, int] = {}
    for table in SCHEMAS:
        entries = [entry for entry in manifest.files if entry.table == table]
        versions[table] = _add_files(dataset, table, version, entries)
    number = known[-1].number + 1 if known else manifest.number
    number = _write_beside(dataset, version, beside, number, versions)
    return Version.open(dataset.place, number)


def _check_extends(dataset: Dataset, version: Version) -> None:
    """What the dataset holds now must all be part of the version, or two histories would mix."""
    mine = {entry.path for entry in version.manifest.files}
    for table in SCHEMAS:
        place = dataset.place.child(table)
        if not delta.exists(place):
            continue
        for path in _paths(dataset, table):
            if path not in mine:
                raise SpecError(
                    f"dataset {dataset.name!r} exists and holds other rows than {version.ref} of the archive "
                    f"(digest {version.manifest.digest[:16]}…)\n  import it under another name with --name"
                )


def _paths(dataset: Dataset, table: str) -> set[str]:
    """The files of a table now, relative to the dataset."""
    place = dataset.place.child(table)
    with delta.delta_errors(place):
        actions = pa.table(delta.open_table(place).get_add_actions(flatten=True))
    return {f"{table}/{unquote(name)}" for name in actions["path"].to_pylist()}


def _add_files(dataset: Dataset, table: str, version: Version, entries: Sequence[FileEntry]) -> int:
    """Copy a table's files and enter those that it does not have; return the table's version."""
    place = dataset.place.child(table)
    opened = delta.create(place, table)
    there = _paths(dataset, table)
    for entry in entries:
        if not dataset.place.holds(entry.path):
            dataset.place.restore(entry.path, version.root / entry.path)
    fresh = [entry for entry in entries if entry.path not in there]
    if fresh:
        with delta.delta_errors(place):
            opened.create_write_transaction(
                [_action(entry) for entry in fresh],
                "append",
                storage_schema(table),
                partition_by=[PARTITION_COLUMN],
                commit_properties=CommitProperties(app_transactions=_transactions(version, fresh)),
            )
            opened.update_incremental()
    return int(opened.version())


def _action(entry: FileEntry) -> AddAction:
    path = entry.path.partition("/")[2]
    value = path.partition("/")[0].partition("=")[2]
    stats: dict[str, Any] = {
        "numRecords": entry.rows,
        "minValues": {"env_seed": entry.min_env_seed},
        "maxValues": {"env_seed": entry.max_env_seed},
        "nullCount": {"env_seed": 0},
    }
    return AddAction(path, entry.size, {PARTITION_COLUMN: value}, int(time.time() * 1000), True, json.dumps(stats))


def _transactions(version: Version, entries: Sequence[FileEntry]) -> list[Transaction]:
    """The highest attempt of each commit in some files, by which later writers know what was committed."""
    highest: dict[str, int] = {}
    for entry in entries:
        rows = pq.read_table(version.root / entry.path, columns=["commit_id", "attempt"], partitioning=None)
        pairs = rows.group_by(["commit_id"]).aggregate([("attempt", "max")]).to_pylist()
        for pair in pairs:
            highest[pair["commit_id"]] = max(highest.get(pair["commit_id"], 0), pair["attempt_max"])
    return [Transaction(commit_id, attempt) for commit_id, attempt in sorted(highest.items())]


def _write_beside(
    dataset: Dataset, version: Version, beside: Sequence[str], number: int, table_versions: dict[str, int]
) -> int:
    """Write manifest, verdict and splits under the dataset's name and the version's number here."""
    mine = manifest_name(version.number)
    update = {"dataset": dataset.name, "number": number, "table_versions": table_versions}
    text = json.dumps(version.manifest.model_copy(update=update).model_dump(mode="json"), indent=1)
    if not dataset.place.write_new(manifest_name(number), text):
        raise StoreError(
            f"{dataset.name}@{number} came into the store while this was imported\n  import it again: it gets the next"
        )
    for name in beside:
        if name == mine:
            continue
        data = json.loads(version.place.read_text(name)) | {"dataset": dataset.name, "version": number}
        target = name.replace(f"versions/{version.number}.", f"versions/{number}.", 1)
        dataset.place.write_over(target, json.dumps(data, indent=1))
    return number
