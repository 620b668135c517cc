"""Sealed versions: exactly the files that a manifest lists, read as tables or in batches, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pydantic import ValidationError

from esper.karn.digest import dataset_digest
from esper.karn.manifest import FileEntry, VersionManifest, read_manifest
from esper.karn.places import MissingFileError, Place, as_place, fetch_all
from esper.karn.tables import (
    COMMIT_COLUMNS,
    PARTITION_COLUMN,
    SORT_COLUMNS,
    attempt_keys,
    check_columns_or_all,
    from_storage,
    last_attempts,
    sort_rows,
    storage_schema,
)
from esper.leyline.errors import IntegrityError, StoreError
from esper.leyline.schema import SCHEMAS, deterministic_columns
from esper.leyline.verdict import Verdict

VERSIONS = "versions"


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference between a sealed version and its manifest.

    `kind` is missing, size, hash, unreadable (these four are of one file, `path` relative to the dataset), damaged,
    digest or counts (of the rows; no path).
    """

    kind: str
    path: str | None
    message: str

    def __str__(self) -> str:
        return self.message


class Version:
    """One sealed version of a dataset; reading never touches a file that the manifest does not list."""

    def __init__(self, where: Place | Path, manifest: VersionManifest) -> None:
        self.place = as_place(where)
        self.manifest = manifest

    @classmethod
    def open(cls, where: Place | Path, number: int) -> Version:
        """Return a version of the dataset at `where` (SchemaError, IntegrityError where it cannot be)."""
        where = as_place(where)
        return cls(where, read_manifest(where, manifest_name(number)))

    @property
    def root(self) -> Path:
        """The local folder of the dataset: itself, or the mirror of a remote one."""
        return self.place.mirror

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.manifest.dataset

    @property
    def number(self) -> int:
        """1 for the first sealed version."""
        return self.manifest.number

    @property
    def ref(self) -> str:
        """`NAME@n`."""
        return f"{self.name}@{self.number}"

    @property
    def path(self) -> Path:
        """The manifest's file where the dataset is on this machine; see `location` for what to show."""
        return self.root / manifest_name(self.number)

    @property
    def location(self) -> str:
        """The address of the manifest, for people."""
        return self.place.show(manifest_name(self.number))

    def __repr__(self) -> str:
        return f"Version({self.ref!r})"

    def files(self, table: str) -> list[Path]:
        """Return the absolute paths of a table's files on this machine (UnknownNameError for an unknown table).

        Those of a remote dataset are downloaded first, unless they are here, and their hashes checked.

        Raises:
            IntegrityError: One is missing, or has another size or hash than the manifest says.
            StoreError: One cannot be read.
        """
        check_columns_or_all(table, ())
        wanted = [(entry.path, entry.size, entry.sha256) for entry in self.manifest.files if entry.table == table]
        try:
            return [path.resolve() for path in fetch_all(self.place, wanted)]
        except MissingFileError as error:
            raise IntegrityError(f"{self.ref}: {error}\n  restore it, or generate the dataset again") from None
        except IntegrityError as error:
            raise IntegrityError(f"{self.ref}: {error}") from None

    @cached_property
    def _episodes(self) -> pa.Table:
        """What tells the rows of each episode's last attempt, unsorted."""
        names = ["episode_id", "env_seed", "num_steps", *COMMIT_COLUMNS]
        return last_attempts(self._scan("episodes", names, None, self.files("episodes")))

    @cached_property
    def _winners(self) -> pa.Array:
        return attempt_keys(self._episodes)

    def table(
        self, table: str, *, columns: Sequence[str] | None = None, filter: pc.Expression | None = None
    ) -> pa.Table:
        """Return rows with the schema's types: existing episodes, last attempts, in store order.

        A column that is younger than the version is null.

        Args:
            table: `steps`, `costs` or `episodes`.
            columns: Names in the order wanted; all of the schema's where None.
            filter: A pyarrow expression over the table's columns.

        Raises:
            UnknownNameError: Unknown table or column.
            IntegrityError: A file is missing or damaged.
        """
        return self._read(table, columns, filter, self.files(table))

    def batches(
        self,
        table: str,
        *,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,
        batch_rows: int = 65_536,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `table(...)` in order, at most `batch_rows` at a time, without loading all of them."""
        names = check_columns_or_all(table, columns)
        for block in self._blocks(table, names, filter, batch_rows):
            yield from block.to_batches(max_chunksize=batch_rows)

    def _blocks(
        self, table: str, columns: Sequence[str], filter: pc.Expression | None, min_rows: int
    ) -> Iterator[pa.Table]:
        """Whole environment seeds in order, about `min_rows` rows of `steps` a block."""
        files = self.files(table)
        entries = [entry for entry in self.manifest.files if entry.table == table]
        for low, high in self._seed_ranges(min_rows):
            near = [
                path for path, entry in zip(files, entries) if entry.min_env_seed <= high and entry.max_env_seed >= low
            ]
            wanted = (pc.field("env_seed") >= low) & (pc.field("env_seed") <= high)
            block = self._read(table, columns, wanted if filter is None else wanted & filter, near)
            if block.num_rows:
                yield block

    def _seed_ranges(self, min_rows: int) -> list[tuple[int, int]]:
        sizes = self._episodes.group_by("env_seed").aggregate([("num_steps", "sum"), ("num_steps", "count")])
        ranges: list[tuple[int, int]] = []
        low, rows = None, 0
        for row in sizes.sort_by("env_seed").to_pylist():
            low = row["env_seed"] if low is None else low
            rows += row["num_steps_sum"] + row["num_steps_count"]
            if rows >= min_rows:
                ranges.append((low, row["env_seed"]))
                low, rows = None, 0
        if low is not None:
            ranges.append((low, row["env_seed"]))
        return ranges

    def _read(
        self, table: str, columns: Sequence[str] | None, filter: pc.Expression | None, files: list[Path]
    ) -> pa.Table:
        names = check_columns_or_all(table, columns)
        order = [name for name in SORT_COLUMNS if name in SCHEMAS[table].names]
        needed = list(dict.fromkeys([*names, *order, *COMMIT_COLUMNS]))
        rows = self._scan(table, needed, filter, files)
        rows = rows.filter(pc.is_in(attempt_keys(rows), self._winners))
        return sort_rows(rows).select(names)

    def _scan(self, table: str, columns: list[str], filter: pc.Expression | None, files: list[Path]) -> pa.Table:
        schema = storage_schema(table)
        if not files:
            return from_storage(table, schema.empty_table().select(columns))
        partitioning = ds.partitioning(pa.schema([schema.field(PARTITION_COLUMN)]), flavor="hive")
        try:
            dataset = ds.dataset(
                [str(path) for path in files],
                schema=schema,
                format="parquet",
                partitioning=partitioning,
                partition_base_dir=str((self.root / table).resolve()),
            )
            return from_storage(table, dataset.to_table(columns=columns, filter=filter, fragment_readahead=2))
        except pa.ArrowNotImplementedError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            damaged = _unreadable(files) or table
            reason = str(error).splitlines()[0]
            raise IntegrityError(
                f"{self.ref}: {damaged} is damaged: {reason}\n  `esper dataset verify {self.ref}` lists every problem"
            ) from None

    def compute_digest(self, block_rows: int = 65_536) -> str:
        """Return the digest of what the files hold now (see `karn.digest`)."""
        schema_version = self.manifest.schema_version
        names = deterministic_columns("steps", schema_version)
        blocks = self._blocks("steps", names, None, block_rows)
        episodes = self._read("episodes", None, None, self.files("episodes"))
        return dataset_digest(episodes, blocks, schema_version)

    def verify(self) -> list[Problem]:
        """Return every difference between the files and the manifest; empty where the version is sound."""
        problems = [problem for entry in self.manifest.files if (problem := self._problem(entry))]
        if problems:
            return problems
        fresh = Version(self.place, self.manifest)
        try:
            digest = fresh.compute_digest()
        except IntegrityError as error:
            return [Problem("damaged", None, str(error))]
        if digest != self.manifest.digest:
            message = f"digest: the rows have {digest}, sealed was {self.manifest.digest}"
            problems.append(Problem("digest", None, message))
        counted = fresh._episodes.num_rows
        if counted != self.manifest.counts.get("episodes"):
            message = f"counts: {counted} episodes, sealed were {self.manifest.counts.get('episodes')}"
            problems.append(Problem("counts", None, message))
        return problems

    def _problem(self, entry: FileEntry) -> Problem | None:
        """What is wrong with a file as the place itself holds it; a copy of it in the mirror is not trusted."""
        name = entry.path
        try:
            size, found = self.place.fingerprint(name)
        except MissingFileError:
            return Problem("missing", name, f"missing: {name}")
        except StoreError as error:
            return Problem("unreadable", name, f"unreadable: {error}")
        if size != entry.size:
            return Problem("size", name, f"size: {name} has {size} bytes, sealed were {entry.size}")
        if found != entry.sha256:
            message = f"hash: {name} has SHA-256 {found[:16]}…, sealed was {entry.sha256[:16]}…"
            return Problem("hash", name, message)
        self.place.refresh(name, entry.sha256)
        return None

    def verdict(self) -> Verdict | None:
        """Return the stored verdict, None where the version was never checked.

        Raises:
            IntegrityError: It is damaged, or was made for other data.
        """
        name = verdict_name(self.number)
        try:
            verdict = Verdict.model_validate_json(self.place.read_text(name))
        except MissingFileError:
            return None
        except ValidationError as error:
            reason = f"{self.place.show(name)} is damaged: {error.errors()[0]['msg']}"
            raise IntegrityError(f"{reason}\n  run `esper health` again") from None
        self._check_verdict(verdict)
        return verdict

    def write_verdict(self, verdict: Verdict) -> None:
        """Store a verdict beside the manifest, replacing an older one; IntegrityError unless it is of this version."""
        self._check_verdict(verdict)
        self.place.write_over(verdict_name(self.number), json.dumps(verdict.model_dump(mode="json"), indent=1))

    def _check_verdict(self, verdict: Verdict) -> None:
        mine = (self.name, self.number, self.manifest.digest)
        theirs = (verdict.dataset, verdict.version, verdict.digest)
        if mine != theirs:
            raise IntegrityError(
                f"the verdict is of {theirs[0]}@{theirs[1]} with digest {theirs[2][:16]}…\n"
                f"  expected: {self.ref} with digest {mine[2][:16]}…; run `esper health {self.ref}` again"
            )


def manifest_name(number: int) -> str:
    """Return the name of a version's manifest, relative to the dataset."""
    return f"{VERSIONS}/{number}.json"


def verdict_name(number: int) -> str:
    """Return the name of a version's verdict, relative to the dataset."""
    return f"{VERSIONS}/{number}.verdict.json"


def _unreadable(files: list[Path]) -> Path | None:
    """The first file whose footer or data cannot be read."""
    import pyarrow.parquet as pq

    for path in files:
        try:
            pq.read_table(path, partitioning=None)
        except (pa.ArrowInvalid, OSError):
            return path
    return None
