"""The whole pipeline on a tiny environment: real engine, real store, real health, real learners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from esper.cli.main import main
from esper.karn.store import open_store
from esper.tamiyo.checkpoints import read_card

COMMAND = ["pipeline", "tiny", "--store", "store", "--workers", "1", "--no-prefect", "--run-name", "r1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline whose control fails: everything is there all the same."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.write_pipeline(folder, bounds="[90.0, 100.0]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield main(COMMAND), folder / "store"


def test_a_failed_control_exits_with_1_after_the_report_was_written(finished):
    code, store = finished
    assert code == 1
    assert (store / "tiny/runs/r1/report.html").stat().st_size > 10_000
    controls = json.loads((store / "tiny/runs/r1/evaluation.json").read_text())["controls"]
    assert [control["passed"] for control in controls].count(False) == 1


def test_every_learner_leaves_a_checkpoint_that_names_its_data(finished):
    folder = finished[1] / "tiny/runs/r1/checkpoints"
    cards = {name: read_card(folder / name) for name in ("bc", "iql", "cql", "iql-ppo")}
    assert {card.dataset for card in cards.values()} == {"tiny@1"}
    assert {card.algorithm for card in cards.values()} == {"bc", "iql", "cql", "ppo"}
    assert all((folder / name / "README.md").is_file() for name in cards)
    assert cards["iql-ppo"].start_digest == cards["iql"].weights_sha256


def test_the_comparison_holds_every_control_and_every_policy(finished):
    arms = json.loads((finished[1] / "tiny/runs/r1/evaluation.json").read_text())["arms"]
    expected = {"never-act", "random", "heuristic", "best-fixed", "bigger", "wider", "bc", "iql", "cql", "iql-ppo"}
    assert {arm["arm"] for arm in arms} == expected


def test_the_last_version_holds_live_and_evaluation_episodes_and_has_a_verdict(finished):
    store = open_store(finished[1])
    first, last = store.resolve("tiny@1"), store.resolve("tiny")
    roles = {
        version.number: set(version.table("episodes", columns=["role"])["role"].to_pylist())
        for version in (first, last)
    }
    assert roles == {1: {"data"}, 2: {"data", "online", "selection", "evaluation"}}
    assert last.verdict().digest == last.manifest.digest


def test_the_events_tell_what_each_process_did(finished):
    folder: Path = finished[1] / "tiny/runs/r1"
    events = [json.loads(line) for path in folder.glob("events-*.jsonl") for line in path.read_text().splitlines()]
    kinds = {event["kind"] for event in events}
    assert {"run.started", "cohort.ended", "health.checked", "train.step", "ppo.update", "evaluation.ended"} <= kinds
    assert {event["data"]["policy"] for event in events if event["kind"] == "train.step"} >= {"bc", "iql", "cql"}


def test_evaluate_and_report_take_up_what_the_pipeline_left(finished, capsys):
    _, store = finished
    checkpoint = str(store / "tiny/runs/r1/checkpoints/bc")
    where = ["--store", str(store), "--no-prefect", "--run-name", "again"]
    command = ["evaluate", "tiny@1", "--pipeline", "tiny", "--policy", checkpoint, "--workers", "0"]
    assert main([*command, *where]) == 1
    assert "controls of the run failed" in capsys.readouterr().err
    assert main(["report", "tiny", *where]) == 0
    assert capsys.readouterr().out.strip().endswith("again/report.html")
