"""`esper heuristic` through the command line: the table, the telemetry, interruption and resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny

from esper.cli.main import main
from esper.leyline.controller_specs import FixedSchedule, Plant
from esper.leyline.events import Event, EventKind
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.nissa.episode_table import EpisodeTable
from esper.simic.poc_arms import NO_REWARD
from esper.tolaria.rollout import CohortRun
from esper.tolaria.telemetry import CohortTelemetry
from flows.sizes import Sizes, sized_environment

RUN = ["heuristic", "--task", "tiny"]


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    root = tiny.write_library(tmp_path, horizon=14)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return root


def events(path):
    return [Event.model_validate_json(line) for line in path.read_text().splitlines()]


def of(kind, found):
    return [event.data for event in found if event.kind is kind]


def test_every_epoch_is_a_line_and_an_event_and_every_episode_has_an_end(tmp_path, capsys):
    assert main([*RUN, "--episodes", "2", "--seed", "7", "--telemetry", "t.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(bool(re.match(r" +\d+ ", line)) for line in lines) == 2 * 15
    assert sum("paired gain" in line for line in lines) == 2 + 1
    assert sum(line.endswith("; data: scikit-learn's bundled 8x8 digits") for line in lines) == 2
    found = events(tmp_path / "t.jsonl")
    assert [data["replicate"] for data in of(EventKind.EPISODE_STARTED, found)] == [7, 8]
    assert [data["epoch"] for data in of(EventKind.EPISODE_EPOCH, found)] == [*range(15), *range(15)]
    ends = of(EventKind.EPISODE_ENDED, found)
    for end in ends:
        gain = end["test_accuracy_percent"] - end["control_test_accuracy_percent"]
        assert end["test_gain_points"] == pytest.approx(gain)
    assert found[-1].data == {"outcome": "completed"}


def test_a_whole_life_is_told_gate_by_gate():
    environment = sized_environment("tiny", Sizes(max_epochs=9))
    schedule = FixedSchedule(name="one", plants=(Plant(slot=1, blueprint="conv_light", birth_epoch=1),))
    plan = CohortPlan(
        environment=environment, reward=NO_REWARD, replicate=1, episodes=(PlannedEpisode(controller=schedule),)
    )
    told = []
    CohortRun.of(plan, watch=CohortTelemetry(plan, lambda kind, data: told.append((kind, data))))
    lives = [(kind, data) for kind, data in told if kind.value.startswith("seed.")]
    stages = [(d["from"], d["to"]) for kind, d in lives if kind is EventKind.SEED_STAGE_CHANGED]
    assert stages == [
        ("DORMANT", "TRAINING"),
        ("TRAINING", "BLENDING"),
        ("BLENDING", "HOLDING"),
        ("HOLDING", "FOSSILIZED"),
    ]
    gates = [(d["gate"], d["passed"], d["epoch"]) for kind, d in lives if kind is EventKind.SEED_GATE_EVALUATED]
    assert gates == [("G1", True, 2), ("G2", True, 3), ("G3", True, 5), ("G5", True, 6)]
    (born,) = [d for kind, d in lives if kind is EventKind.SEED_GERMINATED]
    assert (born["slot"], born["blueprint"], born["tempo_epochs"], born["dwell_epochs"]) == ("late", "conv_light", 3, 1)
    (kept,) = [d for kind, d in lives if kind is EventKind.SEED_FOSSILIZED]
    assert kept["params"] > 0
    (end,) = [data for kind, data in told if kind is EventKind.EPISODE_ENDED]
    assert (end["num_germinated"], end["num_fossilized"], end["num_pruned"]) == (1, 1, 0)
    assert end["seed_params"] == kept["params"]


def test_a_run_from_a_checkpoint_ends_as_the_undisturbed_one(tmp_path, monkeypatch, capsys):
    assert main([*RUN, "--telemetry", "whole.jsonl"]) == 0
    stop = EpisodeTable.__call__

    def interrupt(self, event):
        stop(self, event)
        if event.kind is EventKind.EPISODE_EPOCH and event.data["epoch"] == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(EpisodeTable, "__call__", interrupt)
    assert main([*RUN, "--telemetry", "parts.jsonl", "--checkpoint", "kept"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert events(tmp_path / "parts.jsonl")[-1].data == {"outcome": "interrupted"}
    capsys.readouterr()
    assert main([*RUN, "--telemetry", "parts.jsonl", "--checkpoint", "kept"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "8"  # the last epoch that was kept
    assert not (tmp_path / "kept").exists()
    whole, parts = events(tmp_path / "whole.jsonl"), events(tmp_path / "parts.jsonl")
    ends = [of(EventKind.EPISODE_ENDED, found)[0] for found in (whole, parts)]
    assert {**ends[0], "wall_s": 0} == {**ends[1], "wall_s": 0}
    last = [of(EventKind.EPISODE_EPOCH, found)[-1] for found in (whole, parts)]
    assert last[0] == last[1]


def test_ctrl_c_leaves_valid_lines_and_exits_with_130(tmp_path):
    tiny.write_library(tmp_path, horizon=100_000)
    command = [sys.executable, "-m", "esper.cli.main", *RUN, "--telemetry", "t.jsonl"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 60
        path = tmp_path / "t.jsonl"
        while time.monotonic() < deadline and (not path.exists() or path.read_text().count("\n") < 20):
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(timeout=20) == 130
        assert run.stderr.read() == b"interrupted\n"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in (lines[0], lines[-1])] == ["run.started", "run.ended"]
    assert json.loads(lines[-1])["data"] == {"outcome": "interrupted"}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--task", "tinny"], "did you mean 'tiny'"),
        (["--device", "cuda:0"], "CPU alone"),
        (["--slots", "earli"], "early, late"),
        (["--episodes", "0"], "episodes"),
        (["--seed", "100000"], "100000"),
        (["--episods", "2"], "--episodes"),
        (["--gates", "loose"], "gates"),
    ],
)
def test_a_wrong_option_exits_with_2_and_says_what(arguments, hint, capsys):
    given = RUN if "--task" not in arguments else RUN[:1]
    assert main([*given, *arguments]) == 2
    assert hint in capsys.readouterr().err


def test_a_telemetry_file_that_cannot_be_written_is_a_clear_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*RUN, "--telemetry", "file/t.jsonl"]) == 1
    assert "cannot write events" in capsys.readouterr().err


def test_no_batches_at_most_means_all_of_the_environments(tmp_path):
    assert main([*RUN, "--max-epochs", "2", "--max-batches", "0", "--telemetry", "t.jsonl"]) == 0
    (started,) = of(EventKind.EPISODE_STARTED, events(tmp_path / "t.jsonl"))
    assert started["environment_id"] == sized_environment("tiny", Sizes(max_epochs=2)).spec_id


def test_slots_and_max_seeds_reach_the_environment(tmp_path):
    arguments = ["--slots", "late", "--max-seeds", "1", "--max-epochs", "3", "--max-batches", "1"]
    assert main([*RUN, *arguments, "--telemetry", "t.jsonl"]) == 0
    (started,) = of(EventKind.EPISODE_STARTED, events(tmp_path / "t.jsonl"))
    plain = sized_environment("tiny", Sizes(max_epochs=3))
    limited = sized_environment("tiny", Sizes(max_epochs=3), slots=("late",), max_seeds=1)
    assert started["environment_id"] == limited.spec_id != plain.spec_id
    assert started["horizon_epochs"] == 3
