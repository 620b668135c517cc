from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from factories import concat_tables, select_episodes, synthetic_tables

from esper.karn import delta
from esper.karn.store import open_store
from esper.karn.tables import check_tables, commit_identity, to_storage
from esper.leyline.errors import IntegrityError, SchemaError, SpecError, StoreError, UnknownNameError
from esper.leyline.schema import SCHEMAS


@pytest.fixture(scope="module")
def tables():
    return synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random", "never-act"))


@pytest.fixture
def dataset(tmp_path):
    return open_store(tmp_path).dataset("demo")


def ids_of(tables):
    return tables["episodes"]["episode_id"].to_pylist()


def one_seed(tables, index):
    rows = pl.from_arrow(tables["episodes"])
    seed = rows["env_seed"].unique(maintain_order=True)[index]
    return select_episodes(tables, rows.filter(pl.col("env_seed") == seed)["episode_id"].to_list())


def failing(tables):
    """The same episodes, all failed, without steps or costs."""
    episodes = pl.from_arrow(tables["episodes"]).with_columns(outcome=pl.lit("failed"), error=pl.lit("boom"))
    empty = {name: tables[name].slice(0, 0) for name in ("steps", "costs")}
    return empty | {"episodes": episodes.to_arrow().cast(tables["episodes"].schema)}


def test_the_store_is_the_explicit_folder_then_the_environment_then_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_STORE", str(tmp_path / "env"))
    assert open_store(tmp_path / "explicit").root == tmp_path / "explicit"
    assert open_store().root == tmp_path / "env"
    monkeypatch.delenv("ESPER_STORE")
    assert open_store().root == Path("datasets/local")


def test_a_commit_makes_its_episodes_exist(dataset, tables):
    assert dataset.episode_ids() == set()
    assert dataset.commit(tables) == commit_identity(ids_of(tables))
    assert dataset.episode_ids() == set(ids_of(tables))


def test_a_repeated_commit_changes_nothing(dataset, tables):
    dataset.commit(tables)
    before = {name: DeltaTable(dataset.path / name).version() for name in SCHEMAS}
    assert dataset.commit(tables) is None
    assert {name: DeltaTable(dataset.path / name).version() for name in SCHEMAS} == before


def test_episodes_that_exist_are_left_out_of_a_larger_commit(dataset, tables):
    first = one_seed(tables, 0)
    dataset.commit(first)
    rest = set(ids_of(tables)) - set(ids_of(first))
    assert dataset.commit(tables) == commit_identity(list(rest))
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.manifest.counts["episodes"] == len(ids_of(tables))
    assert version.table("steps").num_rows == tables["steps"].num_rows


@pytest.mark.parametrize("written", [("steps",), ("steps", "costs")])
def test_a_crash_before_the_episodes_leaves_orphans_that_no_view_shows(dataset, tables, written):
    commit_id = commit_identity(ids_of(tables))
    checked = check_tables(tables)
    opened = {table: delta.create(dataset.place.child(table), table) for table in SCHEMAS}
    for table in written:
        assert delta.append(opened[table], table, to_storage(table, checked[table], commit_id, 1), commit_id, 1)
    assert dataset.episode_ids() == set()

    assert dataset.commit(tables) == commit_id
    version = dataset.seal(matrix_id="m", provenance={})
    steps = version.table("steps")
    assert steps.num_rows == tables["steps"].num_rows
    assert set(steps["attempt"].to_pylist()) == {2}
    assert set(version.table("costs")["attempt"].to_pylist()) == {2}
    assert version.verify() == []


def test_a_commit_that_died_in_a_real_process_is_written_again(dataset, tables, tmp_path):
    script = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from factories import synthetic_tables\n"
        "from esper.karn import delta\n"
        "from esper.karn.store import open_store\n"
        "real = delta.append\n"
        "def dying(opened, table, *rest):\n"
        "    if table == 'episodes': os.kill(os.getpid(), 9)\n"
        "    return real(opened, table, *rest)\n"
        "delta.append = dying\n"
        "tables = synthetic_tables(num_env_seeds=2, behaviours=('baseline', 'random', 'never-act'))\n"
        f"open_store({str(tmp_path)!r}).dataset('demo').commit(tables)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, cwd=os.getcwd())
    assert killed.returncode == -9
    assert dataset.episode_ids() == set()
    assert dataset.commit(tables) is not None
    assert dataset.seal(matrix_id="m", provenance={}).table("steps").num_rows == tables["steps"].num_rows


def test_a_failed_episode_exists_and_can_be_attempted_again(dataset, tables):
    part = one_seed(tables, 0)
    dataset.commit(failing(part))
    assert dataset.episode_ids() == set(ids_of(part))
    assert dataset.episode_ids(failed=False) == set()

    assert dataset.commit(failing(part)) is None
    assert dataset.commit(part) == commit_identity(ids_of(part))
    assert dataset.episode_ids(failed=False) == set(ids_of(part))
    episodes = dataset.seal(matrix_id="m", provenance={}).table("episodes")
    assert episodes.num_rows == len(ids_of(part))
    assert set(episodes["outcome"].to_pylist()) == {"completed"}


def test_one_failed_episode_of_a_commit_retried_alone_replaces_the_failure(dataset, tables):
    part = one_seed(tables, 0)
    victim = ids_of(part)[0]
    mixed = concat_tables(select_episodes(part, ids_of(part)[1:]), failing(select_episodes(part, [victim])))
    dataset.commit(mixed)
    assert dataset.commit(select_episodes(part, [victim])) == commit_identity([victim])
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.manifest.counts["failed"] == 0
    assert version.table("steps").num_rows == part["steps"].num_rows


def test_an_episode_committed_twice_at_once_is_shown_once(dataset, tables):
    """Two processes ran overlapping plans: neither saw the other's rows when it began."""
    part = one_seed(tables, 0)
    dataset.commit(part)
    checked = check_tables(select_episodes(part, ids_of(part)[:1]))
    for table in SCHEMAS:
        rows = to_storage(table, checked[table], "another", 1)
        assert delta.append(DeltaTable(dataset.path / table), table, rows, "another", 1)
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.table("episodes").num_rows == len(ids_of(part))
    assert version.table("steps").num_rows == part["steps"].num_rows


def test_a_lost_race_is_treated_as_done(dataset, tables, monkeypatch):
    """Between this process's look and its write another one commits the same attempt."""
    other = open_store(dataset.path.parent).dataset("demo")
    real = dataset._highest_attempt

    def raced(opened, commit_id, existing):
        highest = real(opened, commit_id, existing)
        other.commit(tables)
        return highest

    monkeypatch.setattr(dataset, "_highest_attempt", raced)
    assert dataset.commit(tables) is None
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.table("steps").num_rows == tables["steps"].num_rows


def test_a_race_won_by_a_process_that_then_died_is_committed_by_this_one(dataset, tables, monkeypatch):
    monkeypatch.setattr("esper.karn.store.RACE_PATIENCE_S", 0.0)
    real, calls = dataset._highest_attempt, []

    def raced(opened, commit_id, existing):
        highest = real(opened, commit_id, existing)
        if not calls:
            rows = to_storage("steps", check_tables(tables)["steps"], commit_id, 1)
            assert delta.append(DeltaTable(dataset.path / "steps"), "steps", rows, commit_id, 1)
        calls.append(highest)
        return highest

    monkeypatch.setattr(dataset, "_highest_attempt", raced)
    assert dataset.commit(tables) == commit_identity(ids_of(tables))
    assert calls == [0, 1]
    assert dataset.episode_ids() == set(ids_of(tables))


def _writer(root, first, count, barrier):
    barrier.wait()
    for replicate in range(first, first + count):
        part = synthetic_tables(num_env_seeds=1, first_replicate=replicate, horizon=3)
        open_store(root).dataset("demo").commit(part)


def test_four_processes_that_create_and_append_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_writer, args=(tmp_path, 3 * i, 3, barrier)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    version = open_store(tmp_path).dataset("demo").seal(matrix_id="m", provenance={})
    expected = synthetic_tables(num_env_seeds=12, horizon=3)
    assert set(version.table("episodes")["episode_id"].to_pylist()) == set(ids_of(expected))
    assert version.table("steps").num_rows == expected["steps"].num_rows
    assert version.verify() == []


def _same_writer(root, barrier):
    part = synthetic_tables(num_env_seeds=1, horizon=3)
    barrier.wait()
    open_store(root).dataset("demo").commit(part)
    assert open_store(root).dataset("demo").episode_ids() == set(ids_of(part))


def test_the_same_commit_from_three_processes_at_once_exists_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_same_writer, args=(tmp_path, barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    expected = synthetic_tables(num_env_seeds=1, horizon=3)
    version = open_store(tmp_path).dataset("demo").seal(matrix_id="m", provenance={})
    assert version.table("episodes").num_rows == expected["episodes"].num_rows
    assert version.table("steps").num_rows == expected["steps"].num_rows


def test_floats_are_byte_stream_split_without_a_dictionary(dataset, tables):
    dataset.commit(tables)
    path = next((dataset.path / "steps").glob("environment=*/*.parquet"))
    group = pq.read_metadata(path).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["val_accuracy"].encodings
    assert not columns["val_accuracy"].has_dictionary_page
    assert columns["val_accuracy"].compression == "ZSTD"


def damaged(tables, name, change):
    return tables | {name: change(tables[name])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("steps", lambda t: t.drop_columns(["s0_alpha"]), "lacks the column 's0_alpha'"),
        ("steps", lambda t: t.rename_columns({"s0_alpha": "s0_alpa"}), "unknown column 's0_alpa'; did you mean"),
        ("steps", lambda t: t.set_column(3, "step", pa.nulls(len(t), pa.int32())), "'step' of 'steps' has"),
        ("steps", lambda t: t.set_column(3, "step", pa.array(["x"] * len(t))), "'step' of 'steps' is string"),
        (
            "steps",
            lambda t: t.set_column(
                t.column_names.index("val_loss"), "val_loss", pa.array([float("nan")] * len(t), pa.float32())
            ),
            "'val_loss' of 'steps' has a value that is not finite",
        ),
        ("steps", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "1 repeated rows"),
        ("episodes", lambda t: t.slice(1), "rows of episode"),
        ("episodes", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "appears twice"),
    ],
)
def test_tables_that_break_the_schema_are_refused_and_nothing_is_written(dataset, tables, name, change, message):
    with pytest.raises(SchemaError, match=message):
        dataset.commit(damaged(tables, name, change))
    assert not dataset.path.exists()


def test_names_outside_the_pattern_are_refused(tmp_path):
    for name in ("Demo", "a/b", "..", "", "x" * 41):
        with pytest.raises(SpecError, match="dataset name"):
            open_store(tmp_path).dataset(name)


def test_an_unknown_dataset_names_the_nearest(dataset, tables, tmp_path):
    dataset.commit(tables)
    with pytest.raises(UnknownNameError, match="did you mean 'demo'"):
        open_store(tmp_path).resolve("dmo")


def test_a_dataset_without_a_version_says_so(dataset, tables, tmp_path):
    dataset.commit(tables)
    with pytest.raises(StoreError, match="no sealed version"):
        open_store(tmp_path).resolve("demo")


def test_a_store_that_cannot_be_written_is_one_message(tmp_path, tables):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="choose another with --store"):
        open_store(tmp_path / "file").dataset("demo").commit(tables)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission_is_one_message(tmp_path, tables):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="writable"):
        open_store(tmp_path).dataset("demo").commit(tables)


def test_a_truncated_episodes_file_stops_a_commit_with_its_table_named(dataset, tables):
    dataset.commit(one_seed(tables, 0))
    path = next((dataset.path / "episodes").glob("environment=*/*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises((IntegrityError, StoreError), match="episodes"):
        dataset.episode_ids()
