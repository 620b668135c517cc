"""`esper train --select` end to end: a tiny host, real live episodes, one winner on held-out seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from flow_data import prepare

from esper.cli.main import main
from esper.leyline.comparison import Evaluation, PolicySelection

HERE = ["--store", "store", "--workers", "0", "--no-prefect", "--run-name", "r"]
FQE = """
members = 2
extra_sweeps = 1
patience = 1
steps_per_sweep = 2
batch_size = 16
network = {head = "values", hidden = 8, slot_hidden = 4}
"""
GRID = """
name = "four"
[[learners]]
algorithm = "bc"
fields.steps = [1, 4, 8]
[[learners]]
algorithm = "cql"
fields.steps = [4]
"""
PIPELINE = """
name = "tiny"
matrix = "tiny"
[[evaluation]]
environment = "tiny"
reward = "tiny"
env_seeds = 2
selection_seeds = 2
[[controls]]
environment = "tiny"
best_fixed_gain_points = [-100.0, 100.0]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with a sealed version tiny@1 that was never checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = tiny.write_library(tmp_path, replicates=4, horizon=6)
    (root / "recipes").mkdir()
    (root / "recipes" / "fqe.toml").write_text(FQE)
    (root / "pipelines" / "tiny.toml").write_text(PIPELINE)
    Path("grid.toml").write_text(GRID)
    prepare(tmp_path, ())


def test_all_are_ranked_three_are_tried_live_and_the_winner_alone_meets_held_out_seeds(capsys):
    command = ["train", "tiny", "--grid", "grid.toml", "--select", "--pipeline", "tiny", *HERE]
    assert main([*command, "--override-health", "a test"]) == 0
    said = capsys.readouterr().out
    run = Path("store/tiny/runs/r")
    selection = PolicySelection.model_validate_json((run / "selection.json").read_text())
    names = {"bc-steps-1", "bc-steps-4", "bc-steps-8", "cql"}
    assert {trial.policy for trial in selection.candidates} == names
    predicted = [trial.predicted_return for trial in selection.candidates]
    assert predicted == sorted(predicted, reverse=True)
    valued = json.loads((run / "ope.json").read_text())["policies"]
    scores = {item["policy"]: item["fqe"]["mean"] for item in valued if item["environment"] == "tiny"}
    assert {trial.policy: trial.predicted_return for trial in selection.candidates} == pytest.approx(scores)
    live = {trial.policy: trial.live_return for trial in selection.candidates}
    assert [value is None for value in live.values()] == [False, False, False, True]
    assert live[selection.winner] == max(value for value in live.values() if value is not None)
    evaluation = Evaluation.model_validate_json((run / "evaluation.json").read_text())
    assert {arm.arm for arm in evaluation.arms} & names == {selection.winner}
    assert f"selected: {selection.winner}" in said
    assert (run / "selection.md").read_text().count(selection.winner) >= 2


def test_selection_is_refused_without_a_verdict_and_for_unknown_pipelines_before_anything_is_trained(capsys):
    command = ["train", "tiny", "--grid", "grid.toml", "--select", *HERE]
    assert main([*command, "--pipeline", "tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert main([*command, "--pipeline", "tiny"]) == 3
    assert "never checked" in capsys.readouterr().err
    assert not Path("store/tiny/runs/r/checkpoints").exists()
