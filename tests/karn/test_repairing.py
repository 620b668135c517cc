"""Repair: what the store still has comes back byte for byte; what it does not have is refused, and said to be."""

from __future__ import annotations

import shutil

import pytest
from factories import synthetic_tables

from esper.karn.compaction import compact
from esper.karn.repairing import advice, confirmed, regenerate, repair
from esper.karn.store import open_store
from esper.karn.vacuuming import vacuum
from esper.leyline.schema import SCHEMAS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """demo@1 of two commits, demo@2 of the same rows after compaction."""
    root = tmp_path_factory.mktemp("store")
    dataset = open_store(root).dataset("demo")
    for first in (0, 10):
        dataset.commit(synthetic_tables(num_env_seeds=1, horizon=3, first_replicate=first))
    dataset.seal(matrix_id="small files", provenance={})
    compact(dataset)
    dataset.seal(matrix_id="few files", provenance={})
    return root


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made, tmp_path / "store")
    return open_store(tmp_path / "store")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("table", list(SCHEMAS))
@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()])
def test_a_committed_file_is_written_again_from_the_compacted_one(store, table, damage):
    version = store.resolve("demo@1")
    path = version.files(table)[1]
    before = path.read_bytes()
    damage(path)
    problems = version.verify()
    (done,) = repair(store, version, problems)
    assert done.how is not None
    assert "written again" in done.how
    assert path.read_bytes() == before
    assert confirmed(version) == []


def test_a_compacted_file_is_written_again_from_the_commits(store):
    version = store.resolve("demo@2")
    (path,) = version.files("steps")
    before = path.read_bytes()
    path.unlink()
    (done,) = repair(store, version, version.verify())
    assert done.how == "its rows in 2 commits, written again"
    assert path.read_bytes() == before
    assert confirmed(version) == []


def test_a_copy_anywhere_in_the_store_is_found_by_its_bytes(store):
    version = store.resolve("demo@2")
    store.resolve("demo@1").path.unlink()
    vacuum(store.dataset("demo"), retain_hours=0)
    (path,) = version.files("steps")
    copy = store.root / "backup" / "some-name.parquet"
    copy.parent.mkdir()
    path.rename(copy)
    (done,) = repair(store, version, version.verify())
    assert done.how == "the same bytes in backup/some-name.parquet"
    assert confirmed(version) == []


def test_rows_that_are_gone_are_refused_and_nothing_is_written(store):
    version = store.resolve("demo@2")
    store.resolve("demo@1").path.unlink()
    vacuum(store.dataset("demo"), retain_hours=0)
    (path,) = version.files("steps")
    flip(path)
    damaged = path.read_bytes()
    problems = version.verify()
    (done,) = repair(store, version, problems)
    assert done.how is None
    assert path.read_bytes() == damaged
    assert [problem.kind for problem in confirmed(version)] == ["hash"]
    assert any("another name" in line for line in advice(version, problems))


def test_the_same_episodes_in_another_dataset_have_the_digest_that_the_advice_names(store):
    version = store.resolve("demo@1")
    again = store.dataset("again")
    for first in (10, 0):
        again.commit(synthetic_tables(num_env_seeds=1, horizon=3, first_replicate=first))
    computed = again.seal(matrix_id="small files", provenance={})
    assert computed.manifest.digest == version.manifest.digest
    assert computed.manifest.digest[:16] in regenerate(version)


def test_a_changed_manifest_is_no_matter_of_files(store):
    version = store.resolve("demo@1")
    version.path.write_text(version.path.read_text().replace(version.manifest.digest, "0" * 64))
    changed = store.resolve("demo@1")
    problems = changed.verify()
    assert repair(store, changed, problems) == []
    assert any("Restore the manifest" in line for line in advice(changed, problems))
    assert [problem.kind for problem in confirmed(changed)] == ["digest"]
