"""Repair of a sealed version: damaged and missing files are put back byte for byte, or it is said that they cannot be.

A file is put back where its SHA-256 is the sealed one, and from nowhere else: a copy in the mirror of a remote store, a
file of the store with the same bytes, or its rows, which other files still hold (compaction copies rows), written again
by the writer of the store.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from esper.karn import delta
from esper.karn.compaction import read_files, stage_files
from esper.karn.manifest import FileEntry
from esper.karn.places import file_sha256
from esper.karn.store import Dataset, Store
from esper.karn.tables import sort_rows, storage_schema
from esper.karn.versions import Problem, Version
from esper.leyline.errors import EsperError
from esper.leyline.schema import columns_under

OF_FILES = ("missing", "size", "hash", "unreadable")
"""The kinds of problems that putting a file back can end."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What became of one file: `how` it was put back, or None where nothing holds its bytes or its rows."""

    path: str
    how: str | None


def repair(store: Store, version: Version, problems: Sequence[Problem]) -> list[Repair]:
    """Put back what can be put back of the files that `verify` found damaged or missing; run `verify` again after it.

    A damaged file is replaced only by one with the sealed bytes.

    Raises:
        StoreError: The store cannot be read or written.
    """
    damaged = {problem.path for problem in problems if problem.path is not None and problem.kind in OF_FILES}
    dataset = store.dataset(version.name)
    repairs = []
    for entry in version.manifest.files:
        if entry.path not in damaged:
            continue
        how = None
        with tempfile.TemporaryDirectory(prefix="esper-repair-") as folder:
            for source, name in _sources(store, dataset, version, entry, damaged, Path(folder)):
                version.place.restore(entry.path, source)
                version.place.refresh(entry.path, entry.sha256)
                how = name
                damaged.discard(entry.path)
                break
        repairs.append(Repair(entry.path, how))
    return repairs


def _sources(
    store: Store, dataset: Dataset, version: Version, entry: FileEntry, damaged: set[str], folder: Path
) -> Iterator[tuple[Path, str]]:
    """Files of this machine with exactly the sealed bytes, and where they come from."""
    mirrored = version.root / entry.path
    if version.place.storage_options is not None and _is_whole(mirrored, entry):
        kept = folder / "mirrored.parquet"
        mirrored.rename(kept)
        yield kept, "the local copy of the remote file"
    for file in store.place.files():
        if file.size != entry.size or not file.name.endswith(".parquet"):
            continue
        if store.place.fingerprint(file.name) == (entry.size, entry.sha256):
            yield store.place.fetch(file.name, entry.size, entry.sha256), f"the same bytes in {file.name}"
    for index, (rows, name) in enumerate(_row_sets(dataset, version, entry, damaged)):
        for action in stage_files(entry.table, rows, folder / str(index)):
            staged = folder / str(index) / unquote(action["path"])
            if action["size"] == entry.size and _is_whole(staged, entry):
                yield staged, f"its rows in {name}, written again"


def _is_whole(path: Path, entry: FileEntry) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    return False


def _row_sets(
    dataset: Dataset, version: Version, entry: FileEntry, damaged: set[str]
) -> Iterator[tuple[pa.Table, str]]:
    """Sorted rows that may be those of a lost file, in every column order that its writer may have used."""
    everything: dict[tuple[str, int], pa.Table] = {}
    for name in _neighbours(dataset, entry, damaged):
        rows = _rows_within(dataset, entry, name)
        for key, group in _commits(rows).items():
            everything.setdefault(key, group)
            if len(group) == entry.rows:
                yield from _orders(version, entry, group, name)
        if len(rows) == entry.rows:
            yield from _orders(version, entry, rows, name)
    together = pa.concat_tables(everything.values()) if everything else None
    if together is not None and len(everything) > 1 and len(together) == entry.rows:
        yield from _orders(version, entry, together, f"{len(everything)} commits")


def _neighbours(dataset: Dataset, entry: FileEntry, damaged: set[str]) -> list[str]:
    """The other files of the table's partition: current, sealed, and those that nothing names any more."""
    folder = entry.path.rsplit("/", 1)[0]
    names = (name for name in dataset.place.names(folder) if name.endswith(".parquet"))
    return [name for name in names if name != entry.path and name not in damaged]


def _rows_within(dataset: Dataset, entry: FileEntry, name: str) -> pa.Table:
    """The rows of a file in the range of environment seeds of another; none where it cannot be read."""
    partition = entry.path.rsplit("/", 2)[-2].partition("=")[2]
    try:
        with delta.delta_errors(dataset.place):
            rows = read_files(entry.table, [dataset.place.fetch(name)], [partition])
    except EsperError:
        return storage_schema(entry.table).empty_table()
    seeds = rows["env_seed"]
    return rows.filter(pc.and_(pc.greater_equal(seeds, entry.min_env_seed), pc.less_equal(seeds, entry.max_env_seed)))


def _commits(rows: pa.Table) -> dict[tuple[str, int], pa.Table]:
    """The rows of each attempt of each commit."""
    keys = rows.group_by(["commit_id", "attempt"], use_threads=False).aggregate([]).to_pylist()
    return {
        (key["commit_id"], key["attempt"]): rows.filter(
            pc.and_(pc.equal(rows["commit_id"], key["commit_id"]), pc.equal(rows["attempt"], key["attempt"]))
        )
        for key in keys
    }


def _orders(version: Version, entry: FileEntry, rows: pa.Table, name: str) -> Iterator[tuple[pa.Table, str]]:
    """The rows with the columns of the sealed schema, and those that the table has now, in its order."""
    where = version.place.child(entry.table)
    with delta.delta_errors(where):
        current = [field.name for field in delta.open_table(where).schema().fields]
    sealed = columns_under(entry.table, version.manifest.schema_version)
    rows = sort_rows(rows)
    for columns in {tuple(sealed): None, tuple(current): None}:
        yield rows.select(columns), name


def advice(version: Version, problems: Sequence[Problem]) -> list[str]:
    """Return what to do about each kind of problem there is, in sentences."""
    kinds = {problem.kind for problem in problems}
    lines = []
    if kinds & set(OF_FILES):
        lines.append(
            f"`esper dataset verify {version.ref} --repair` puts back every file whose bytes or rows the store still "
            "has; a copy of your own may be placed anywhere in the store, and is found by its bytes"
        )
    if kinds & {"digest", "counts", "damaged"}:
        lines.append(
            "the files are what was sealed, or cannot be read; their rows do not give the digest: the manifest was "
            "changed, or another version of the code wrote it. Restore the manifest from a copy"
        )
    if kinds:
        lines.append(regenerate(version))
    return lines


def regenerate(version: Version) -> str:
    """Return how rows that are lost come back."""
    return (
        f"`esper datagen` of the same matrix ({version.manifest.matrix_id}) into a dataset of another name computes "
        f"the rows again; with the same code its digest is {version.manifest.digest[:16]}…"
    )


def confirmed(version: Version) -> list[Problem]:
    """Return what `verify` still finds, read anew."""
    return Version.open(version.place, version.number).verify()
