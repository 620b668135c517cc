"""`esper dataset` beyond looking: verify with repair, compact, vacuum, diff, versions, splits, stats, card."""

from __future__ import annotations

import csv
import json
import shutil

import pyarrow.parquet as pq
import pytest
from factories import synthetic_tables

from esper.cli.main import main
from esper.karn.progress_table import PlannedCell, PlanOnRecord
from esper.karn.store import open_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """demo@1 of two commits, demo@2 of three."""
    root = tmp_path_factory.mktemp("care")
    dataset = open_store(root).dataset("demo")
    for first in (0, 10):
        dataset.commit(synthetic_tables(num_env_seeds=2, behaviours=("baseline",), horizon=3, first_replicate=first))
    dataset.seal(matrix_id="m1", provenance={"packages": {"torch": "1"}})
    dataset.commit(synthetic_tables(num_env_seeds=1, behaviours=("random",), horizon=3))
    dataset.seal(matrix_id="m1", provenance={"packages": {"torch": "2"}, "skeleton": True})
    return root


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made, tmp_path / "store")
    return open_store(tmp_path / "store")


@pytest.fixture
def run(store, capsys):
    def call(*arguments):
        code = main(["dataset", *arguments, "--store", str(store.root)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_versions_tell_what_each_has_more_than_the_one_before(run):
    code, out, _ = run("versions", "demo")
    assert code == 0
    first, second = (line for line in out.splitlines() if line.strip().startswith("demo@"))
    assert " first " in first
    assert "+1 episodes, +3 decisions" in second
    assert "(SKELETON)" in second
    assert "not checked" in second


def test_diff_prints_cells_and_provenance_and_writes_the_episodes(run, tmp_path):
    target = tmp_path / "episodes.csv"
    code, out, _ = run("diff", "demo@1", "demo@2", "--output", str(target))
    assert code == 0
    assert "1 added, 0 removed, 0 changed" in out
    assert "packages.torch" in out
    (row,) = csv.DictReader(target.open())
    assert (row["change"], row["controller"]) == ("added", "random")
    code, out, _ = run("diff", "demo@2", "demo")
    assert (code, out) == (0, "no episode differs between demo@2 and demo@2\n")


def test_compact_and_vacuum_print_what_they_did_and_keep_both_versions(run, store):
    code, out, _ = run("compact", "demo")
    assert code == 0
    steps = next(line.split() for line in out.splitlines() if line.strip().startswith("steps"))
    assert steps[1:3] == ["3", "1"]
    code, out, err = run("vacuum", "demo", "--retain-hours", "0")
    assert (code, out) == (0, "0 files, 0 bytes removed\n")
    store.resolve("demo@1").path.unlink()
    store.resolve("demo@2").path.unlink()
    code, out, err = run("vacuum", "demo")
    assert out == "0 files, 0 bytes removed\n"
    assert "9 files, " in err
    assert "younger than 24 h" in err
    code, out, _ = run("vacuum", "demo", "--retain-hours", "0", "--dry-run")
    assert "9 files, " in out
    assert "would be removed" in out
    code, out, _ = run("vacuum", "demo", "--retain-hours", "0")
    assert "9 files, " in out
    assert "replaced" in out
    assert len([name for name in store.dataset("demo").place.names("steps") if name.endswith(".parquet")]) == 1


def test_verify_repairs_what_the_store_still_has_and_says_so(run, store):
    run("compact", "demo")
    path = store.resolve("demo@1").files("steps")[0]
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"!")
    code, out, err = run("verify", "demo@1")
    assert (code, out) == (4, "")
    assert "to do: `esper dataset verify demo@1 --repair`" in err
    assert path.read_bytes() != before
    code, out, err = run("verify", "demo@1", "--repair")
    assert code == 0
    assert "put back from its rows" in err
    assert "demo@1 is sound" in out
    assert path.read_bytes() == before


def test_verify_claims_no_repair_that_did_not_work(run, store):
    path = store.resolve("demo@1").files("steps")[0]
    path.unlink()
    code, out, err = run("verify", "demo@1", "--repair")
    assert (code, out) == (4, "")
    assert "nothing has its bytes or its rows" in err
    assert "could not be repaired" in err
    assert "`esper datagen` of the same matrix (m1) into a dataset of another name" in err


def test_verify_all_names_every_version_and_fails_where_one_is_damaged(run, store):
    code, out, _ = run("verify", "--all")
    assert code == 0
    assert out.count("is sound") == 2
    only_second = set(store.resolve("demo@2").files("steps")) - set(store.resolve("demo@1").files("steps"))
    only_second.pop().unlink()
    code, out, err = run("verify", "--all")
    assert code == 4
    assert "demo@1 is sound" in out
    assert "demo@2 has 1 problem" in err
    store.resolve("demo@1").path.write_text("{")
    code, _, err = run("verify", "--all")
    assert code == 4
    assert "1.json is damaged" in err


@pytest.mark.parametrize("arguments", [[], ["demo", "--all"]])
def test_verify_takes_a_version_or_all(run, arguments):
    code, _, err = run("verify", *arguments)
    assert code == 2
    assert "--all" in err


def test_orphans_are_listed_with_their_bytes(run, store):
    path = store.resolve("demo").files("steps")[0]
    shutil.copy(path, path.with_name("part-stray.parquet"))
    code, _, err = run("verify", "demo")
    assert code == 0
    assert f"part-stray.parquet ({path.stat().st_size:,} bytes)" in err


def test_splits_are_stored_once_and_another_wish_names_the_stored_one(run):
    code, out, err = run("splits", "demo@1")
    assert code == 0
    assert "validation" in out
    code, _, err = run("splits", "demo@1", "--fractions", "0.5", "0.25", "0.25")
    assert code == 2
    assert "fractions 0.85 0.15 0" in err
    assert "--name" in err
    code, _, err = run("splits", "demo@1", "--fractions", "0.5", "0.25", "0.25", "--name", "thirds")
    assert code == 0
    assert "other splits: default" in err
    code, _, err = run("splits", "demo@1", "--name", "third")
    assert code == 2
    assert "did you mean 'thirds'" in err


@pytest.mark.parametrize(
    "fractions", [["0.5", "0.5"], ["0", "0.5", "0.5"], ["0.9", "0.3", "-0.2"], ["0.5", "0.2", "0.2"]]
)
def test_shares_that_are_none_are_usage_errors(run, fractions):
    assert run("splits", "demo@1", "--name", "odd", "--fractions", *fractions)[0] == 2


def test_a_share_that_no_seed_is_held_out_for_is_said(tmp_path, capsys):
    small = open_store(tmp_path).dataset("demo")
    small.commit(synthetic_tables(num_env_seeds=3, behaviours=("never-act",), horizon=2))
    small.seal(matrix_id="m", provenance={})
    assert main(["dataset", "splits", "demo", "--fractions", "0.4", "0.3", "0.3", "--store", str(tmp_path)]) == 0
    assert "no seed for validation and test: an environment with fewer than 4 seeds" in capsys.readouterr().err


def test_stats_per_split_are_printed_and_written(run, tmp_path):
    code, out, _ = run("stats", "demo@1", "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert sum(row["episodes"] for row in rows if row["environment"] == "(all)") == 8
    target = tmp_path / "features.parquet"
    code, _, _ = run("stats", "demo@1", "--features", "--output", str(target))
    assert code == 0
    assert {"train_loss", "s0_stage"} <= set(pq.read_table(target)["feature"].to_pylist())


def test_card_goes_to_stdout_or_to_a_file_of_either_kind(run, tmp_path):
    code, out, _ = run("card", "demo@2")
    assert code == 0
    assert "SKELETON" in out
    assert run("card", "demo@1", "--output", str(tmp_path / "card.html"))[0] == 0
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")
    code, _, err = run("card", "demo@1", "--output", str(tmp_path / "card.txt"))
    assert code == 2
    assert ".md or .html" in err


def test_show_prints_the_progress_of_the_plan_and_works_before_the_first_seal(run, store):
    fresh = store.dataset("fresh")
    tables = synthetic_tables(num_env_seeds=1, behaviours=("never-act",), horizon=2)
    fresh.commit(tables)
    ids = (*tables["episodes"]["episode_id"].to_pylist(), "f" * 24)
    spec = tables["episodes"]["environment_id"][0].as_py()
    cell = PlannedCell(
        environment="digits-gap", environment_id=spec, role="data", root="host", controller="never-act", epsilon=0.0,
        planned=2, episode_ids=ids,
    )  # fmt: skip
    plan = PlanOnRecord(matrix="m", matrix_id="abc", created_at="2026-01-01T00:00:00+00:00", cells=(cell,))
    fresh.place.write_over("plans/abc.json", plan.model_dump_json())
    code, out, err = run("show", "fresh")
    assert code == 0
    assert "not sealed yet" in err
    assert "1 of 2 episodes done" in err
    assert "never-act" in out
    fresh.seal(matrix_id="abc", provenance={})
    whole = cell.model_copy(update={"planned": 1, "episode_ids": ids[:1]})
    fresh.place.write_over("plans/abc.json", plan.model_copy(update={"cells": (whole,)}).model_dump_json())
    code, out, err = run("show", "fresh")
    lines = [line.split() for line in out.partition("plan on record")[2].splitlines()]
    assert ["digits-gap", "1", "1", "0", "0"] in lines
    assert "1 of 1 episodes done" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["versions", "dmo"], "did you mean 'demo'"),
        (["compact", "dmo"], "did you mean 'demo'"),
        (["vacuum", "demo@1"], "expected: the dataset's name, 'demo'"),
        (["versions", "../x"], "is not allowed"),
        (["show", "demo@"], "is no version"),
        (["show", "demo@x"], "is no version"),
        (["card", "demo@9"], "known: demo@1, demo@2"),
        (["diff", "demo@1", "demo@3"], "did you mean 'demo@2'"),
        (["stats", "demo@1", "--name", "odd"], "unknown split 'odd'"),
        (["vacuum", "demo", "--retain-hours", "-1"], "expected: 0 or more"),
        (["compact", "demo", "--target-mib", "0"], "expected: above 0"),
        (["diff", "demo@1", "demo@2", "--format", "csv"], "--output"),
    ],
)
def test_what_does_not_exist_or_is_malformed_exits_with_2(run, arguments, expected):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in err


@pytest.mark.parametrize("command", [["ls"], ["show", "demo"], ["verify", "--all"], ["versions", "demo"]])
def test_a_store_that_is_a_file_exits_with_2(tmp_path, capsys, command):
    (tmp_path / "file").write_text("x")
    assert main(["dataset", *command, "--store", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_an_empty_store_has_nothing_to_verify_and_no_dataset(tmp_path, capsys):
    assert main(["dataset", "verify", "--all", "--store", str(tmp_path)]) == 0
    assert "no sealed version" in capsys.readouterr().err
    assert main(["dataset", "show", "demo", "--store", str(tmp_path / "none")]) == 2
    assert "`esper datagen` makes one" in capsys.readouterr().err
