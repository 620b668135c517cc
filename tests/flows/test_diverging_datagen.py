"""Environments whose learning rate diverges: rows that say so, exit code 0, and a dataset that health can read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tiny

from esper.cli.main import main
from esper.karn.catalogue import connect
from esper.karn.report_data import read_counts
from esper.karn.store import open_store
from esper.leyline.errors import SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import load_transitions
from esper.tolaria.workers import cohort_engine
from flows.datagen import generate
from flows.planning import plan_matrix
from quality.checking import check


def _library(folder, learning_rate: str, extra: str = "") -> None:
    root = tiny.write_library(folder, replicates=2, horizon=8)
    path = root / "environments" / "tiny.toml"
    path.write_text(path.read_text().replace("learning_rate = 0.05", f"learning_rate = {learning_rate}\n{extra}"))


def _sound(version) -> None:
    steps = version.table("steps", columns=None)
    for name in steps.column_names:
        if pa.types.is_floating(steps[name].type):
            assert pc.all(pc.is_finite(steps[name].drop_null())).as_py() is not False, name


def test_datagen_of_a_diverging_environment_ends_with_outcome_rows_and_exit_code_0(tmp_path, monkeypatch, capsys):
    _library(tmp_path, "100.0", "momentum = 0.99")
    monkeypatch.chdir(tmp_path)
    command = ["datagen", "--matrix", "tiny", "--store", str(tmp_path / "store"), "--workers", "0", "--no-prefect"]
    assert main(command) == 0
    version = open_store(tmp_path / "store").dataset("tiny").versions()[-1]
    rows = version.table("episodes", columns=["outcome", "control_valid", "num_rollbacks", "num_steps"]).to_pylist()
    assert len(rows) == 8
    assert {row["outcome"] for row in rows} <= {"diverged", "rolled_back"}
    assert "diverged" in {row["outcome"] for row in rows}
    assert not any(row["control_valid"] for row in rows)
    assert all(row["num_rollbacks"] > 0 for row in rows)
    _sound(version)
    capsys.readouterr()


BURST = 'schedule = "drops"\nlr_drops = [[1, 20000.0], [2, 5e-5]]'


@pytest.fixture
def rolled_back(tmp_path, monkeypatch):
    _library(tmp_path, "0.05", BURST)
    monkeypatch.chdir(tmp_path)
    matrix, plans = plan_matrix("tiny")
    with tiny.context(tmp_path, cohort_engine) as context:
        return generate(context, matrix, plans).version


def test_health_reads_rollbacks_and_finds_no_contradiction_in_them(rolled_back, tmp_path):
    rows = rolled_back.table("episodes", columns=["outcome", "control_valid"]).to_pylist()
    assert {row["outcome"] for row in rows} == {"rolled_back"}
    steps = rolled_back.table("steps", columns=["episode_id", "step", "op", "num_rollbacks"]).to_pylist()
    after = {(row["episode_id"], row["step"] - 1): row["num_rollbacks"] for row in steps}
    undone = {row["op"] for row in steps if after.get((row["episode_id"], row["step"]), 0) > row["num_rollbacks"]}
    assert {"GERMINATE", "ADVANCE"} <= undone
    verdict = check(rolled_back, docs_dir=tmp_path / "docs")
    levels = {result.name: result.level.value for result in verdict.checks}
    for name in (
        "legal_transitions",
        "interventions_have_effect",
        "executed_flags",
        "paired_control",
        "finite_values",
        "masks_recompute",
    ):
        assert levels[name] == "pass", (name, levels)
    for name in ("valid_actions", "germinations_make_seeds", "seeds_receive_gradient", "schema", "episode_ends"):
        assert levels[name] == "pass", (name, levels)
    assert levels["control_valid"] != "pass"
    _sound(rolled_back)


def test_rolled_back_episodes_are_counted_apart_and_never_dropped(rolled_back):
    counts = read_counts(rolled_back)
    assert [(c.episodes, c.rolled_back, c.diverged, c.control_invalid) for c in counts] == [(8, 8, 0, 8)]
    with connect(rolled_back) as connection:
        cells = connection.sql("SELECT sum(episodes), sum(rolled_back), sum(control_invalid) FROM cells").fetchall()
    assert cells == [(8, 8, 8)]
    with pytest.raises(SpecError, match="8 failed or have no valid control"):
        load_transitions(rolled_back, "v4", {"tiny": load("rewards", "tiny", RewardSpec)})
