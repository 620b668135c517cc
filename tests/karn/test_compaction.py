"""Compaction and vacuum: few files, the same rows, and never a file of a sealed version lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from factories import concat_tables, select_episodes, synthetic_tables
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper.karn.compaction import compact
from esper.karn.store import open_store
from esper.karn.tables import storage_schema
from esper.karn.vacuuming import unused_files, vacuum
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.schema import SCHEMAS

NUM_COMMITS = 5


@lru_cache(maxsize=1)
def commits():
    """What is committed in one go: one environment seed each, of two environments."""
    whole = concat_tables(
        synthetic_tables(num_env_seeds=3, behaviours=("baseline",), horizon=3),
        synthetic_tables(environment="cifar16-gap", num_env_seeds=2, behaviours=("baseline",), horizon=3),
    )
    keys = whole["episodes"].group_by(["environment", "env_seed"], use_threads=False).aggregate([]).to_pylist()
    parts = []
    for key in keys:
        mine = pc.and_(*(pc.equal(whole["episodes"][name], value) for name, value in key.items()))
        parts.append(select_episodes(whole, whole["episodes"].filter(mine)["episode_id"].to_pylist()))
    assert len(parts) == NUM_COMMITS
    return parts


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    root = tmp_path_factory.mktemp("committed")
    for part in commits():
        open_store(root).dataset("demo").commit(part)
    return root


@pytest.fixture
def dataset(committed, tmp_path):
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    return open_store(tmp_path).dataset("demo")


def seal(dataset):
    """A new version whatever the latest one holds."""
    return dataset.seal(matrix_id=f"m{len(dataset.version_numbers())}", provenance={})


def check_writer(table, old, new):
    """Compression, encodings and schema of a file are those of another."""
    floats = {field.name for field in storage_schema(table) if pa.types.is_floating(field.type)}
    for file in (old, new):
        group = file.metadata.row_group(0)
        for index in range(file.metadata.num_columns):
            column = group.column(index)
            assert column.compression == "ZSTD"
            if column.path_in_schema in floats:
                assert "BYTE_STREAM_SPLIT" in column.encodings
    assert new.schema_arrow == old.schema_arrow


def test_compaction_leaves_one_sorted_file_a_partition_written_as_commits_are_and_the_digest_as_it_was(dataset):
    before = seal(dataset)
    done = {item.table: item for item in compact(dataset)}
    assert {(item.files_before, item.files_after) for item in done.values()} == {(NUM_COMMITS, 2)}
    assert done["steps"].bytes_after < done["steps"].bytes_before
    after = seal(dataset)
    assert (after.number, after.manifest.digest) == (2, before.manifest.digest)
    assert [(item.files_before, item.files_after) for item in compact(dataset)] == [(2, 2)] * 3
    for table in SCHEMAS:
        assert after.table(table).equals(before.table(table))
        for path in after.files(table):
            keys = [name for name in ("env_seed", "episode_id", "step", "actor") if name in SCHEMAS[table].names]
            rows = [tuple(row.values()) for row in pq.read_table(path, columns=keys, partitioning=None).to_pylist()]
            assert rows == sorted(rows)
        check_writer(table, *(pq.ParquetFile(version.files(table)[0]) for version in (before, after)))


def test_a_target_size_keeps_the_files_of_one_seed_together_and_large_ones_alone(dataset):
    compact(dataset, target_bytes=1)
    assert len(dataset.seal(matrix_id="m", provenance={}).files("steps")) == NUM_COMMITS
    size = max(entry.size for entry in dataset.versions()[0].manifest.files if entry.table == "steps")
    (steps,) = [item for item in compact(dataset, target_bytes=2 * size + 1) if item.table == "steps"]
    assert steps.files_after < NUM_COMMITS


WRITER = """
import sys
sys.path[:0] = [{tests!r}]
from test_compaction import commits
from esper.karn.store import open_store
dataset = open_store({root!r}).dataset("demo")
for part in commits():
    assert dataset.commit(part) is not None
    print("committed", flush=True)
"""


def test_a_writer_in_another_process_and_two_compactions_at_once_lose_and_double_nothing(dataset, tmp_path):
    reference = seal(dataset)
    dataset = open_store(tmp_path / "store").dataset("demo")
    script = WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path / "store"))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "committed\n"
    num_compactions = []

    def keep_compacting():
        while writer.poll() is None:
            compact(dataset)
            num_compactions.append(1)

    threads = [threading.Thread(target=keep_compacting) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.returncode == 0
    assert num_compactions
    compact(dataset)
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.manifest.digest == reference.manifest.digest
    assert version.verify() == []
    rows = sum(pq.read_metadata(path).num_rows for path in version.files("steps"))
    assert rows == sum(part["steps"].num_rows for part in commits())


def test_a_killed_compaction_leaves_files_that_are_never_read_and_vacuum_removes(dataset, tmp_path):
    script = (
        "import os\n"
        "from esper.karn import compaction\n"
        "from esper.karn.store import open_store\n"
        "compaction.CommitProperties = lambda **_: os.kill(os.getpid(), 9)\n"
        f"compaction.compact(open_store({str(tmp_path)!r}).dataset('demo'))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode == -9
    version = seal(dataset)
    assert version.verify() == []
    (orphan,) = unused_files(dataset)
    assert (orphan.why, orphan.is_old) == ("orphan", False)
    assert vacuum(dataset) == []
    assert [file.name for file in vacuum(dataset, retain_hours=0)] == [orphan.name]
    assert version.verify() == []
    assert unused_files(dataset) == []


def test_vacuum_counts_a_replaced_file_from_when_it_was_replaced(dataset):
    """A sealing that began before the compaction may be about to name it, however old it is."""
    for name in dataset.place.names("steps"):
        os.utime(dataset.path / name, (0, 0))
    compact(dataset)
    replaced = unused_files(dataset)
    assert {(file.why, file.is_old) for file in replaced} == {("replaced", False)}
    assert len(replaced) == 3 * NUM_COMMITS
    stray = dataset.path / replaced[0].name
    stray.with_name("stray.parquet").write_bytes(stray.read_bytes())
    os.utime(stray.with_name("stray.parquet"), (0, 0))
    assert [Path(file.name).name for file in vacuum(dataset)] == ["stray.parquet"]
    assert len(vacuum(dataset, retain_hours=0)) == 3 * NUM_COMMITS
    assert dataset.episode_ids() == {name for part in commits() for name in part["episodes"]["episode_id"].to_pylist()}


def test_vacuum_keeps_what_only_an_old_version_names(dataset):
    old = seal(dataset)
    compact(dataset)
    assert unused_files(dataset, retain_hours=0) == []
    old.path.unlink()
    assert len(unused_files(dataset, retain_hours=0)) == 3 * NUM_COMMITS


def test_a_partition_whose_name_needs_escapes_is_exchanged_too(tmp_path):
    dataset = open_store(tmp_path).dataset("odd")
    for part in commits()[:2]:
        tables = {}
        for name, table in part.items():
            place = table.schema.get_field_index("environment")
            names = pa.array(["my env%é"] * len(table))
            tables[name] = table.set_column(place, table.schema.field(place), names)
        dataset.commit(tables)
    before = seal(dataset)
    assert {(item.files_before, item.files_after) for item in compact(dataset)} == {(2, 1)}
    assert seal(dataset).manifest.digest == before.manifest.digest
    before.path.unlink()
    assert len(vacuum(dataset, retain_hours=0)) == 6
    assert dataset.versions()[0].verify() == []


def test_vacuum_refuses_while_a_manifest_cannot_be_read(dataset):
    version = seal(dataset)
    compact(dataset)
    version.path.write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        vacuum(dataset, retain_hours=0)
    assert len(list((dataset.path / "steps").glob("*/*.parquet"))) == NUM_COMMITS + 2


@pytest.mark.parametrize("hours", [-1.0, float("nan")])
def test_a_retention_that_is_no_time_is_refused(dataset, hours):
    with pytest.raises(SpecError, match="expected: 0 or more"):
        vacuum(dataset, retain_hours=hours)


def test_a_dataset_without_tables_cannot_be_compacted(tmp_path):
    with pytest.raises(StoreError, match="nothing was committed"):
        compact(open_store(tmp_path).dataset("none"))


STEPS = st.lists(st.sampled_from(["commit", "commit", "seal", "compact", "vacuum"]), max_size=8)


def check_any_order(steps):
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_store(Path(folder)).dataset("demo")
        waiting = list(commits())
        dataset.commit(waiting.pop())
        sealed = []
        for step in [*steps, "compact", "vacuum", "seal"]:
            if step == "commit" and waiting:
                dataset.commit(waiting.pop())
            elif step == "seal":
                sealed.append(seal(dataset))
            elif step == "compact":
                compact(dataset)
            elif step == "vacuum":
                vacuum(dataset, retain_hours=0)
        for version in sealed:
            assert version.verify() == []
        there = [name for part in commits()[len(waiting) :] for name in part["episodes"]["episode_id"].to_pylist()]
        assert sorted(sealed[-1].table("episodes")["episode_id"].to_pylist()) == sorted(there)


@settings(max_examples=1, deadline=None, derandomize=True)
@given(STEPS)
@example(["commit", "seal", "commit", "compact", "seal", "vacuum", "commit", "compact"])
def test_whatever_the_order_of_commits_seals_compactions_and_vacuums_every_version_stays_whole(steps):
    check_any_order(steps)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_forty_orders_of_commits_seals_compactions_and_vacuums(steps):
    check_any_order(steps)
