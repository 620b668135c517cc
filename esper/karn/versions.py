"""Sealed versions: exactly the files that a manifest lists, read as tables or in batches, and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pydantic import ValidationError

from esper.karn.digest import dataset_digest
from esper.karn.manifest import FileEntry, VersionManifest, read_manifest, write_over
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

HASH_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Version:
    """One sealed version of a dataset; reading never touches a file that the manifest does not list."""

    def __init__(self, root: Path, manifest: VersionManifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: Path, number: int) -> Version:
        """Return a version of the dataset at `root` (SchemaError, IntegrityError where it cannot be)."""
        return cls(root, read_manifest(manifest_path(root, number)))

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
        """The manifest's file."""
        return manifest_path(self.root, self.number)

    def __repr__(self) -> str:
        return f"Version({self.ref!r})"

    def files(self, table: str) -> list[Path]:
        """Return the absolute paths of a table's files (UnknownNameError for an unknown table).

        Raises:
            IntegrityError: One is missing or has another size than the manifest says.
        """
        check_columns_or_all(table, ())
        return [self._check_size(entry) for entry in self.manifest.files if entry.table == table]

    def _check_size(self, entry: FileEntry) -> Path:
        path = (self.root / entry.path).resolve()
        try:
            size = path.stat().st_size
        except OSError as error:
            raise IntegrityError(
                f"{self.ref}: {path} cannot be read: {error.strerror}\n  restore it, or generate the dataset again"
            ) from None
        if size != entry.size:
            raise IntegrityError(
                f"{self.ref}: {path} has {size} bytes\n"
                f"  expected: {entry.size} (sealed); restore it, or generate the dataset again"
            )
        return path

    @cached_property
    def _episodes(self) -> pa.Table:
        """The row of each episode's last attempt, unsorted, all columns."""
        return last_attempts(self._scan("episodes", list(SCHEMAS["episodes"].names), None, self.files("episodes")))

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
            return from_storage(table, dataset.to_table(columns=columns, filter=filter))
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

    def verify(self) -> list[str]:
        """Return every difference between the files and the manifest; empty where the version is sound."""
        problems = [problem for entry in self.manifest.files if (problem := self._problem(entry))]
        if problems:
            return problems
        fresh = Version(self.root, self.manifest)
        try:
            digest = fresh.compute_digest()
        except IntegrityError as error:
            return [str(error)]
        if digest != self.manifest.digest:
            problems.append(f"digest: the rows have {digest}, sealed was {self.manifest.digest}")
        counted = fresh._episodes.num_rows
        if counted != self.manifest.counts.get("episodes"):
            problems.append(f"counts: {counted} episodes, sealed were {self.manifest.counts.get('episodes')}")
        return problems

    def _problem(self, entry: FileEntry) -> str | None:
        path = self.root / entry.path
        try:
            size = path.stat().st_size
            if size != entry.size:
                return f"size: {entry.path} has {size} bytes, sealed were {entry.size}"
            found = file_sha256(path)
        except FileNotFoundError:
            return f"missing: {entry.path}"
        except OSError as error:
            return f"unreadable: {entry.path}: {error.strerror}"
        if found != entry.sha256:
            return f"hash: {entry.path} has SHA-256 {found[:16]}…, sealed was {entry.sha256[:16]}…"
        return None

    def verdict(self) -> Verdict | None:
        """Return the stored verdict, None where the version was never checked.

        Raises:
            IntegrityError: It is damaged, or was made for other data.
        """
        path = self._verdict_path
        if not path.is_file():
            return None
        try:
            verdict = Verdict.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from None
        except ValidationError as error:
            raise IntegrityError(f"{path} is damaged: {error.errors()[0]['msg']}\n  run `esper health` again") from None
        self._check_verdict(verdict)
        return verdict

    def write_verdict(self, verdict: Verdict) -> Path:
        """Store a verdict beside the manifest, replacing an older one; IntegrityError unless it is of this version."""
        self._check_verdict(verdict)
        write_over(self._verdict_path, json.dumps(verdict.model_dump(mode="json"), indent=1))
        return self._verdict_path

    def _check_verdict(self, verdict: Verdict) -> None:
        mine = (self.name, self.number, self.manifest.digest)
        theirs = (verdict.dataset, verdict.version, verdict.digest)
        if mine != theirs:
            raise IntegrityError(
                f"the verdict is of {theirs[0]}@{theirs[1]} with digest {theirs[2][:16]}…\n"
                f"  expected: {self.ref} with digest {mine[2][:16]}…; run `esper health {self.ref}` again"
            )

    @property
    def _verdict_path(self) -> Path:
        return self.path.with_name(f"{self.number}.verdict.json")


def manifest_path(root: Path, number: int) -> Path:
    """Return where a version's manifest lies."""
    return root / "versions" / f"{number}.json"


def _unreadable(files: list[Path]) -> Path | None:
    """The first file whose footer or data cannot be read."""
    import pyarrow.parquet as pq

    for path in files:
        try:
            pq.read_table(path, partitioning=None)
        except (pa.ArrowInvalid, OSError):
            return path
    return None
