"""Disks that fill up, turn read-only or lose files: nothing stored is lost, and the message says what to do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import Tables, select_episodes, synthetic_tables

from esper.karn import delta
from esper.karn.places import LocalPlace
from esper.karn.store import Dataset, open_store
from esper.leyline.errors import StoreError
from esper.leyline.schema import SCHEMAS

DISK_BYTES = 4 << 20


@pytest.fixture(scope="module")
def tables() -> Tables:
    return synthetic_tables(num_env_seeds=4, horizon=6)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def ids_of(tables: Tables) -> list[str]:
    return tables["episodes"]["episode_id"].to_pylist()


def halves(tables: Tables) -> tuple[Tables, Tables]:
    ids = ids_of(tables)
    return select_episodes(tables, ids[: len(ids) // 2]), select_episodes(tables, ids[len(ids) // 2 :])


def seal(dataset: Dataset):
    return dataset.seal(matrix_id="m", provenance={})


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """The disk without a free byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    try:
        yield
    finally:
        ballast.unlink()


def attempts(dataset: Dataset, table: str) -> set[int]:
    return set(delta.read_current(dataset.place.child(table), table, ["attempt"])["attempt"].to_pylist())


def digest_on_a_sound_disk(tables: Tables, folder: Path) -> str:
    dataset = open_store(folder).dataset("demo")
    dataset.commit(tables)
    return seal(dataset).manifest.digest


@pytest.mark.parametrize("table", SCHEMAS)
def test_a_disk_that_fills_up_before_a_table_of_a_commit(
    table: str, disk: Path, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second commit finds no space for one of its tables: with space again it goes through as another attempt."""
    first, second = halves(tables)
    dataset = open_store(disk).dataset("demo")
    dataset.commit(first)
    real = delta.append

    with contextlib.ExitStack() as stack:

        def filling(opened, name, *rest):
            if name == table:
                stack.enter_context(full(disk))
            return real(opened, name, *rest)

        monkeypatch.setattr(delta, "append", filling)
        with pytest.raises(StoreError, match="no space left on the disk\n  free some space"):
            dataset.commit(second)
        assert open_store(disk).dataset("demo").episode_ids() == set(ids_of(first))
    monkeypatch.setattr(delta, "append", real)

    assert dataset.commit(second) is not None
    version = seal(dataset)
    assert attempts(dataset, "steps") == ({1} if table == "steps" else {1, 2})
    assert version.verify() == []
    assert version.manifest.digest == digest_on_a_sound_disk(tables, tmp_path / "sound")
    assert version.table("steps").num_rows == tables["steps"].num_rows


def test_a_version_cannot_be_sealed_on_a_full_disk_and_can_be_afterwards(disk: Path, tables: Tables) -> None:
    dataset = open_store(disk).dataset("demo")
    dataset.commit(tables)
    with full(disk), pytest.raises(StoreError, match="No space left on device\n  free some space"):
        seal(dataset)
    assert dataset.version_numbers() == []
    assert list((disk / "demo" / "versions").glob("*")) == []
    version = seal(dataset)
    assert (version.ref, version.verify()) == ("demo@1", [])


def test_a_read_only_store_is_read_and_refuses_what_would_change_it(disk: Path, tables: Tables) -> None:
    first, second = halves(tables)
    dataset = open_store(disk).dataset("demo")
    dataset.commit(first)
    version = seal(dataset)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert version.verify() == []
    assert version.table("episodes").num_rows == first["episodes"].num_rows
    assert dataset.commit(first) is None
    for write in (lambda: dataset.commit(second), lambda: open_store(disk).dataset("other").commit(second)):
        with pytest.raises(StoreError, match="the file system is read-only\n  make it writable"):
            write()
    with pytest.raises(StoreError, match="Read-only file system\n  choose another"):
        dataset.place.write_new("versions/2.json", "{}")
    assert open_store(disk).resolve("demo").ref == "demo@1"


def test_a_file_that_the_table_lists_and_nobody_has_is_named_by_seal(tables: Tables, tmp_path: Path) -> None:
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(tables)
    name = delta.current_files(dataset.place)["steps"][1][0]
    (dataset.path / name).unlink()
    with pytest.raises(StoreError, match=name.rsplit("/", 1)[-1]):
        seal(dataset)


def test_a_place_writes_whole_files_or_nothing(tmp_path: Path) -> None:
    where = LocalPlace(tmp_path)
    source = tmp_path / "source"
    source.write_bytes(b"bytes")
    where.restore("a/b.parquet", source)
    assert (tmp_path / "a" / "b.parquet").read_bytes() == b"bytes"
    assert where.write_new("a/c.json", "{}")
    assert not where.write_new("a/c.json", "{} ")
    where.append("a/d.jsonl", "1")
    where.append("a/d.jsonl", "2")
    assert (where.read_text("a/c.json"), where.read_text("a/d.jsonl")) == ("{}", "1\n2\n")
    assert where.names("a") == ["a/b.parquet", "a/c.json", "a/d.jsonl"]
    assert where.folders() == ["a"]
    assert where.holds("a/c.json")
    assert not where.holds("a/none")
    where.remove("a/c.json")
    where.remove("a/c.json")
    assert where.names("a") == ["a/b.parquet", "a/d.jsonl"]


NUM_WRITERS = 4
EPISODES_EACH = 1000
SEEDS_EACH = 250  # four episodes of each


def _big_writer(root: str, index: int, barrier) -> None:
    """Commit a thousand episodes, ten environment seeds at a time."""
    first = index * SEEDS_EACH
    parts = [
        synthetic_tables(num_env_seeds=10, first_replicate=replicate, horizon=2, epsilons=(0.0, 0.1, 0.2))
        for replicate in range(first, first + SEEDS_EACH, 10)
    ]
    barrier.wait()
    dataset = open_store(root).dataset("demo")
    for part in parts:
        dataset.commit(part)


@pytest.mark.slow
def test_four_writers_of_a_thousand_episodes_each_lose_and_double_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(NUM_WRITERS)
    writers = [context.Process(target=_big_writer, args=(str(tmp_path), i, barrier)) for i in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(900)
    assert [writer.exitcode for writer in writers] == [0] * NUM_WRITERS
    version = seal(open_store(tmp_path).dataset("demo"))
    episodes = version.table("episodes", columns=["episode_id", "num_steps"])
    assert episodes.num_rows == len(set(episodes["episode_id"].to_pylist())) == NUM_WRITERS * EPISODES_EACH
    assert version.table("steps").num_rows == NUM_WRITERS * EPISODES_EACH * 3
    assert version.verify() == []
