"""The store: datasets in one folder or one prefix of an object store, committed by cohort, sealed as versions.

STORE/NAME/{steps,costs,episodes} are Delta Lake tables partitioned by environment, STORE/NAME/versions the sealed
versions, STORE/NAME/runs what runs left behind.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pydantic import JsonValue

from esper.karn import delta
from esper.karn.manifest import NAME_PATTERN, FileEntry, VersionManifest, check_dataset_name
from esper.karn.places import Place, as_place, file_sha256, place
from esper.karn.tables import check_tables, commit_identity, last_attempts, to_storage
from esper.karn.versions import VERSIONS, Version, manifest_name
from esper.leyline.errors import SpecError, StoreError, unknown_name
from esper.leyline.schema import SCHEMA_VERSION, SCHEMAS

__all__ = ["Dataset", "Store", "Version", "open_store"]

DEFAULT_ROOT = Path("datasets/local")
RACES = 3
RACE_PATIENCE_S = 10.0
_IDENTITY = ["episode_id", "attempt", "commit_id", "outcome"]


def open_store(explicit: str | Path | None = None) -> Store:
    """Return the store at `explicit`, else $ESPER_STORE, else datasets/local; nothing is created yet.

    Args:
        explicit: A folder, or s3://bucket/prefix with the credentials in the environment.

    Raises:
        SpecError: A malformed address, or one that carries credentials.
        StoreError: An object store, and the environment has no credentials for it.
    """
    return Store(place(explicit or os.environ.get("ESPER_STORE") or DEFAULT_ROOT))


class Store:
    """A folder of datasets, on this machine or on an object store."""

    def __init__(self, where: Place | Path) -> None:
        self.place = as_place(where)

    @property
    def root(self) -> Path:
        """The local folder of the store: itself, or the mirror of a remote one, where runs leave their files."""
        return self.place.mirror

    @property
    def url(self) -> str:
        """What another process, on any machine, opens this store by: an absolute path, or s3://bucket/prefix."""
        return self.place.url

    def names(self) -> list[str]:
        """Return the names of the datasets that hold at least their tables."""
        return [
            name
            for name in self.place.folders()
            if NAME_PATTERN.match(name) and delta.exists(self.place.child(name).child("episodes"))
        ]

    def dataset(self, name: str) -> Dataset:
        """Return a dataset, which need not exist yet (SpecError where the name is not allowed)."""
        return Dataset(self.place.child(check_dataset_name(name)), name)

    def resolve(self, ref: str) -> Version:
        """Return the version that `NAME@n`, or the latest that `NAME`, stands for.

        Raises:
            SpecError: The reference is malformed.
            UnknownNameError: Unknown dataset or version.
            StoreError: The dataset has no sealed version.
        """
        name, at, number = ref.partition("@")
        check_dataset_name(name)
        if at and not number.isdecimal():
            raise SpecError(f"{ref!r} is no version\n  expected: NAME or NAME@n, for example demo@1")
        known = self.names()
        if name not in known:
            error = unknown_name("dataset", name, known)
            raise type(error)(f"{error}\n  store: {self.place.show()}; `esper datagen` makes one")
        dataset = self.dataset(name)
        numbers = dataset.version_numbers()
        if not numbers:
            raise StoreError(f"dataset {name!r} has no sealed version\n  `esper datagen` seals one when it is complete")
        if not at:
            return Version.open(dataset.place, numbers[-1])
        if int(number) not in numbers:
            raise unknown_name("version", ref, [f"{name}@{n}" for n in numbers])
        return Version.open(dataset.place, int(number))


class Dataset:
    """One dataset of a store."""

    def __init__(self, where: Place | Path, name: str) -> None:
        self.place = as_place(where)
        self.name = name

    @property
    def path(self) -> Path:
        """The local folder of the dataset: itself, or the mirror of a remote one."""
        return self.place.mirror

    def episode_ids(self, *, failed: bool = True) -> set[str]:
        """Return the ids of the episodes that exist; `failed=False` leaves out those whose outcome is `failed`."""
        rows = last_attempts(delta.read_current(self.place.child("episodes"), "episodes", _IDENTITY))
        if not failed:
            rows = rows.filter(pc.not_equal(rows["outcome"], "failed"))
        return set(rows["episode_id"].to_pylist())

    def commit(self, tables: Mapping[str, pa.Table]) -> str | None:
        """Add what ran together and return the commit id, None where nothing of it was new.

        Episodes that exist already are left out, unless what exists is `failed` and what comes is not. After a crash
        in between, the rows written so far belong to no episode, and committing again writes the next attempt.

        Args:
            tables: `steps`, `costs` and `episodes` without the commit columns.

        Raises:
            SchemaError: The tables are not what the schema says.
            StoreError: The store cannot be written.
        """
        checked = check_tables(tables)
        for _ in range(RACES):
            existing = self._existing(checked["episodes"])
            fresh = _only_new(checked, existing)
            ids = fresh["episodes"]["episode_id"].to_pylist()
            if not ids:
                return None
            commit_id = commit_identity(ids)
            if self._write(fresh, commit_id, existing):
                return commit_id
            self._await_other(set(ids))
        raise StoreError(f"cannot commit to {self.place.show()}: another process begins this commit but never ends it")

    def _write(self, tables: Mapping[str, pa.Table], commit_id: str, existing: pa.Table) -> bool:
        """Append the three tables as the next attempt; False where another process is making the same one."""
        opened = {table: delta.create(self.place.child(table), table) for table in SCHEMAS}
        attempt = 1 + self._highest_attempt(opened, commit_id, existing)
        return all(
            delta.append(opened[table], table, to_storage(table, tables[table], commit_id, attempt), commit_id, attempt)
            for table in SCHEMAS
        )

    def _highest_attempt(self, opened: Mapping[str, DeltaTable], commit_id: str, existing: pa.Table) -> int:
        """The highest attempt of this commit in any table, or of its episodes in another commit."""
        attempts: list[int] = [delta.highest_attempt(table, commit_id) for table in opened.values()]
        attempts += existing["attempt"].to_pylist()
        return max(attempts)

    def _await_other(self, ids: set[str]) -> None:
        """Wait until the process that won the race has written its episodes, or is taken for dead."""
        deadline = time.monotonic() + RACE_PATIENCE_S
        while time.monotonic() < deadline and not ids <= self.episode_ids():
            time.sleep(0.1)

    def _existing(self, episodes: pa.Table) -> pa.Table:
        """The last attempts of what exists among the given episodes."""
        seeds = pc.unique(episodes["env_seed"]).to_pylist()
        rows = delta.read_current(self.place.child("episodes"), "episodes", _IDENTITY, seeds)
        return last_attempts(rows.filter(pc.is_in(rows["episode_id"], episodes["episode_id"].combine_chunks())))

    def version_numbers(self) -> list[int]:
        """Return the numbers of the sealed versions, ascending."""
        names = (name.removeprefix(f"{VERSIONS}/") for name in self.place.names(VERSIONS))
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def versions(self) -> list[Version]:
        """Return the sealed versions, oldest first."""
        return [Version.open(self.place, number) for number in self.version_numbers()]

    def seal(self, *, matrix_id: str, provenance: dict[str, JsonValue]) -> Version:
        """Freeze what the tables hold now as the next version; sealing equal data again returns the latest one.

        Args:
            matrix_id: What the episodes were planned by.
            provenance: Specs, machine, packages: whatever tells where the data comes from.

        Raises:
            StoreError: Nothing was committed, or the manifest cannot be written.
        """
        files = delta.current_files(self.place)
        entries = tuple(self._entry(table, name) for table in SCHEMAS for name in files[table][1])
        manifest = self._manifest(entries, {name: files[name][0] for name in SCHEMAS}, matrix_id, provenance)
        while True:
            latest = self.versions()[-1:]
            if latest and (latest[0].manifest.digest, latest[0].manifest.matrix_id) == (manifest.digest, matrix_id):
                return latest[0]
            number = latest[0].number + 1 if latest else 1
            manifest = manifest.model_copy(update={"number": number})
            text = json.dumps(manifest.model_dump(mode="json"), indent=1)
            if self.place.write_new(manifest_name(number), text):
                return Version(self.place, manifest)

    def _entry(self, table: str, name: str) -> FileEntry:
        path = self.place.fetch(name)
        with delta.delta_errors(path):
            seeds = pq.read_table(path, columns=["env_seed"], partitioning=None)["env_seed"]
            size, sha256 = path.stat().st_size, file_sha256(path)
        low, high = (pc.min_max(seeds)[bound].as_py() for bound in ("min", "max"))
        return FileEntry(
            table=table, path=name, size=size, sha256=sha256, rows=len(seeds), min_env_seed=low, max_env_seed=high
        )

    def _manifest(
        self,
        files: tuple[FileEntry, ...],
        table_versions: dict[str, int],
        matrix_id: str,
        provenance: dict[str, JsonValue],
    ) -> VersionManifest:
        draft = VersionManifest(
            dataset=self.name,
            number=0,
            schema_version=SCHEMA_VERSION,
            digest="",
            matrix_id=matrix_id,
            code_commits=(),
            table_versions=table_versions,
            files=files,
            counts={},
            provenance=provenance,
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        version = Version(self.place, draft)
        episodes = version.table("episodes", columns=["env_seed", "environment", "outcome", "num_steps", "code_commit"])
        if not episodes.num_rows:
            raise StoreError(f"dataset {self.name!r} holds no episode, so there is nothing to seal")
        counts = {
            "episodes": episodes.num_rows,
            "decisions": pc.sum(episodes["num_steps"]).as_py(),
            "env_seeds": pc.count_distinct(episodes["env_seed"]).as_py(),
            "environments": pc.count_distinct(episodes["environment"]).as_py(),
            "failed": pc.sum(pc.equal(episodes["outcome"], "failed")).as_py(),
        }
        commits = tuple(sorted(pc.unique(episodes["code_commit"]).to_pylist()))
        update = {"digest": version.compute_digest(), "counts": counts, "code_commits": commits}
        return draft.model_copy(update=update)

    def orphan_names(self) -> list[str]:
        """Return Parquet files that no table lists now and no sealed version names: what a killed writer left.

        The names are relative to the dataset's place, sorted.
        """
        known = {entry.path for version in self.versions() for entry in version.manifest.files}
        for _, names in delta.current_files(self.place).values():
            known.update(names)
        found = (name for table in SCHEMAS for name in self.place.names(table) if name.endswith(".parquet"))
        return sorted(name for name in found if f"/{delta.LOG}/" not in name and name not in known)

    def orphan_files(self) -> list[Path]:
        """Return `orphan_names` as paths in the dataset's local folder."""
        return [self.path / name for name in self.orphan_names()]


def _only_new(tables: Mapping[str, pa.Table], existing: pa.Table) -> dict[str, pa.Table]:
    """The rows of episodes that do not exist, or that exist as failed and come as not failed."""
    episodes = tables["episodes"]
    there = existing["episode_id"].combine_chunks()
    failed_there = existing.filter(pc.equal(existing["outcome"], "failed"))["episode_id"].combine_chunks()
    retried = pc.and_(pc.is_in(episodes["episode_id"], failed_there), pc.not_equal(episodes["outcome"], "failed"))
    new = pc.or_(pc.invert(pc.is_in(episodes["episode_id"], there)), retried)
    if pc.all(new).as_py():
        return dict(tables)
    wanted = episodes.filter(new)["episode_id"].combine_chunks()
    return {name: table.filter(pc.is_in(table["episode_id"], wanted)) for name, table in tables.items()}
