from __future__ import annotations

import json
import shutil
import threading

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.store import open_store
from esper.karn.versions import Problem, Version
from esper.leyline.errors import IntegrityError, SchemaError, SpecError, StoreError, UnknownNameError
from esper.leyline.schema import SCHEMA_VERSION, SCHEMAS
from esper.leyline.verdict import CheckResult, Level, Use, Verdict


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with one dataset of two environments, committed in three parts, and its sealed version."""
    root = tmp_path_factory.mktemp("store")
    parts = [
        synthetic_tables(num_env_seeds=2),
        synthetic_tables(num_env_seeds=1, first_replicate=2),
        synthetic_tables(environment="digits-baseline", num_env_seeds=1),
    ]
    dataset = open_store(root).dataset("demo")
    for part in parts:
        dataset.commit(part)
    dataset.seal(matrix_id="matrix-1", provenance={"machine": "test"})
    return root, concat_tables(*parts)


@pytest.fixture
def version(made):
    return open_store(made[0]).resolve("demo")


@pytest.fixture
def copied(made, tmp_path):
    """A version that a test may damage."""
    shutil.copytree(made[0], tmp_path / "store")
    return open_store(tmp_path / "store").resolve("demo")


def file_of(version, table):
    return version.root / next(entry.path for entry in version.manifest.files if entry.table == table)


def verdict_of(sealed, **changes):
    check = CheckResult(name="coverage", environment="digits-gap", level=Level.BLOCK, value=0.1, message="poor")
    fields = {
        "dataset": sealed.name,
        "version": sealed.number,
        "digest": sealed.manifest.digest,
        "checked_at": "2026-01-01",
        "checks": (check,),
    }
    return Verdict(**(fields | changes))


def test_a_version_returns_what_was_committed_in_store_order(version, made):
    for name, expected in made[1].items():
        keys = [(key, "ascending") for key in ("env_seed", "episode_id", "step") if key in expected.column_names]
        rows = version.table(name, columns=expected.column_names)
        assert rows.cast(expected.schema).equals(expected.sort_by(keys)), name
        assert version.table(name).schema.equals(SCHEMAS[name])


def test_columns_come_in_the_order_asked_for_and_filters_apply(version, made):
    rows = version.table("steps", columns=["op", "step"], filter=pc.field("environment") == "digits-baseline")
    assert rows.column_names == ["op", "step"]
    expected = made[1]["steps"].filter(pc.equal(made[1]["steps"]["environment"], "digits-baseline"))
    assert rows.num_rows == expected.num_rows


@pytest.mark.parametrize("table", ["steps", "costs", "episodes"])
@pytest.mark.parametrize("batch_rows", [1, 17, 65_536])
def test_batches_are_the_table_in_pieces(version, table, batch_rows):
    batches = list(version.batches(table, batch_rows=batch_rows))
    assert all(0 < batch.num_rows <= batch_rows for batch in batches)
    assert pa.Table.from_batches(batches).equals(version.table(table))


def test_batches_apply_columns_and_filters(version):
    wanted = {"columns": ["episode_id", "op"], "filter": pc.field("op") == "GERMINATE"}
    batches = list(version.batches("steps", batch_rows=10, **wanted))
    assert pa.Table.from_batches(batches).equals(version.table("steps", **wanted))


def test_unknown_tables_and_columns_name_the_nearest(version):
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        version.table("step")
    with pytest.raises(UnknownNameError, match="did you mean 'val_accuracy'"):
        version.table("steps", columns=["val_acuracy"])


def test_the_manifest_says_what_is_there(version):
    manifest = version.manifest
    assert manifest.counts == {"episodes": 12, "decisions": 72, "env_seeds": 4, "environments": 2, "failed": 0}
    assert manifest.code_commits == ("synthetic",)
    assert manifest.provenance == {"machine": "test"}
    assert set(manifest.table_versions) == set(SCHEMAS)
    assert sum(entry.rows for entry in manifest.files if entry.table == "episodes") == 12


def test_later_commits_do_not_change_a_sealed_version(copied):
    dataset = open_store(copied.root.parent).dataset("demo")
    before = copied.table("episodes").num_rows
    dataset.commit(synthetic_tables(num_env_seeds=1, first_replicate=7))
    newer = dataset.seal(matrix_id="matrix-1", provenance={})
    assert (newer.ref, newer.table("episodes").num_rows) == ("demo@2", before + 3)
    again = open_store(copied.root.parent).resolve("demo@1")
    assert again.table("episodes").num_rows == before
    assert again.verify() == []
    assert [version.ref for version in dataset.versions()] == ["demo@1", "demo@2"]
    assert open_store(copied.root.parent).resolve("demo").ref == "demo@2"


def test_sealing_the_same_data_again_returns_the_same_version(copied):
    dataset = open_store(copied.root.parent).dataset("demo")
    assert dataset.seal(matrix_id="matrix-1", provenance={}).ref == "demo@1"
    assert dataset.seal(matrix_id="another", provenance={}).ref == "demo@2"


def test_sealers_at_the_same_time_never_overwrite_each_other(copied):
    dataset = open_store(copied.root.parent).dataset("demo")
    sealed: list[Version] = []
    threads = [
        threading.Thread(target=lambda i=i: sealed.append(dataset.seal(matrix_id=f"m{i}", provenance={})))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version.number for version in sealed) == [2, 3, 4, 5]
    for version in sealed:
        assert Version.open(version.root, version.number).manifest.matrix_id == version.manifest.matrix_id


def test_nothing_to_seal_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="nothing was committed"):
        open_store(tmp_path).dataset("demo").seal(matrix_id="m", provenance={})


def test_the_digest_does_not_depend_on_commits_or_layout(made, tmp_path):
    """All rows in one commit, in another order: another layout, the same digest."""
    tables = {name: table.take(list(reversed(range(len(table))))) for name, table in made[1].items()}
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(tables)
    version = dataset.seal(matrix_id="m", provenance={})
    assert version.manifest.digest == open_store(made[0]).resolve("demo").manifest.digest
    assert version.compute_digest(block_rows=1) == version.manifest.digest


def test_a_sound_version_has_no_problems(version):
    assert version.verify() == []


def test_verify_reports_a_missing_file(copied):
    path = file_of(copied, "costs")
    path.unlink()
    name = path.relative_to(copied.root).as_posix()
    assert copied.verify() == [Problem("missing", name, f"missing: {name}")]


def test_verify_reports_a_file_of_another_size(copied):
    path = file_of(copied, "steps")
    path.write_bytes(path.read_bytes() + b"x")
    (problem,) = copied.verify()
    assert (problem.kind, problem.path) == ("size", path.relative_to(copied.root).as_posix())


@pytest.mark.parametrize("position", [4, 0.5, -5])
def test_verify_reports_one_flipped_byte(copied, position):
    path = file_of(copied, "episodes")
    data = bytearray(path.read_bytes())
    data[int(position * len(data)) if isinstance(position, float) else position] ^= 1
    path.write_bytes(bytes(data))
    (problem,) = copied.verify()
    assert (problem.kind, problem.path) == ("hash", path.relative_to(copied.root).as_posix())


def test_verify_reports_a_manifest_with_another_digest(copied):
    data = json.loads(copied.path.read_text())
    copied.path.write_text(json.dumps(data | {"digest": "0" * 64}))
    (problem,) = Version.open(copied.root, 1).verify()
    assert (problem.kind, problem.path) == ("digest", None)


def test_files_of_no_commit_are_orphans_and_never_read(copied):
    stray = file_of(copied, "steps").with_name("part-stray.parquet")
    stray.write_bytes(file_of(copied, "steps").read_bytes())
    assert open_store(copied.root.parent).dataset("demo").orphan_files() == [stray]
    assert copied.verify() == []


def test_a_truncated_file_is_named(copied):
    path = file_of(copied, "steps")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=path.name):
        copied.table("steps")


def test_a_damaged_file_of_the_right_size_is_named(copied):
    path = file_of(copied, "episodes")
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(IntegrityError, match=path.name):
        copied.table("episodes")


def test_a_newer_schema_is_refused_with_what_to_do(copied):
    data = json.loads(copied.path.read_text())
    copied.path.write_text(json.dumps(data | {"schema_version": 99, "unheard_of": 1}))
    with pytest.raises(SchemaError, match=f"schema version 99\n  expected: at most {SCHEMA_VERSION}"):
        open_store(copied.root.parent).resolve("demo")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 1}'])
def test_a_damaged_manifest_is_an_integrity_error(copied, text):
    copied.path.write_text(text)
    with pytest.raises(IntegrityError, match="is damaged"):
        open_store(copied.root.parent).resolve("demo@1")


def test_unknown_versions_and_malformed_references_are_refused(made):
    store = open_store(made[0])
    with pytest.raises(UnknownNameError, match="unknown version 'demo@9'"):
        store.resolve("demo@9")
    for ref in ("demo@", "demo@x", "demo@-1"):
        with pytest.raises(SpecError, match="expected: NAME or NAME@n"):
            store.resolve(ref)


def test_a_verdict_is_stored_beside_its_version(copied):
    assert copied.verdict() is None
    copied.write_verdict(verdict_of(copied))
    stored = open_store(copied.root.parent).resolve("demo").verdict()
    assert stored == verdict_of(copied)
    assert stored.level(Use.OFFLINE_RL) is Level.BLOCK
    assert [version.number for version in open_store(copied.root.parent).dataset("demo").versions()] == [1]


@pytest.mark.parametrize("changes", [{"digest": "0" * 64}, {"version": 2}, {"dataset": "other"}])
def test_a_verdict_of_other_data_is_refused(copied, changes):
    with pytest.raises(IntegrityError, match="the verdict is of"):
        copied.write_verdict(verdict_of(copied, **changes))
    copied.path.with_name("1.verdict.json").write_text(verdict_of(copied, **changes).model_dump_json())
    with pytest.raises(IntegrityError, match="the verdict is of"):
        copied.verdict()
