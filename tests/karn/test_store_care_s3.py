"""Compaction, vacuum, splits and repair of a dataset on an object store."""

from __future__ import annotations

import shutil

import pytest
from factories import synthetic_tables
from s3_server import BUCKET, environment_of, s3_server

from esper.karn.compaction import compact
from esper.karn.repairing import confirmed, repair
from esper.karn.splits_stored import split_names, stored_split
from esper.karn.store import open_store
from esper.karn.vacuuming import unused_files, vacuum


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture
def store(endpoint, tmp_path, monkeypatch):
    for name, value in environment_of(endpoint, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{BUCKET}/care/{tmp_path.name}")


def test_a_remote_dataset_is_compacted_vacuumed_split_and_repaired(store):
    dataset = store.dataset("demo")
    for first in (0, 10):
        dataset.commit(synthetic_tables(num_env_seeds=1, horizon=3, first_replicate=first))
    old = dataset.seal(matrix_id="m1", provenance={})
    stored_split(old)
    assert split_names(old) == ["default"]
    assert [(item.files_before, item.files_after) for item in compact(dataset)] == [(2, 1)] * 3
    new = dataset.seal(matrix_id="m2", provenance={})
    assert new.manifest.digest == old.manifest.digest
    assert old.verify() == new.verify() == []
    assert unused_files(dataset, retain_hours=0) == []

    by_name = {file.name: file for file in dataset.place.files("steps")}
    entry = next(entry for entry in new.manifest.files if entry.table == "steps")
    assert by_name[entry.path].size == entry.size

    damaged = next(entry for entry in old.manifest.files if entry.table == "steps")
    dataset.place.write_over(damaged.path, "x" * damaged.size)
    (done,) = repair(store, old, old.verify())
    assert done.how == "the local copy of the remote file"
    assert confirmed(old) == []

    shutil.rmtree(old.root)
    dataset.place.remove(damaged.path)
    (done,) = repair(store, old, old.verify())
    assert done.how is not None
    assert "written again" in done.how
    assert confirmed(old) == []

    dataset.place.remove("versions/1.json")
    assert len(vacuum(dataset, retain_hours=0)) == 6
    assert new.verify() == []
