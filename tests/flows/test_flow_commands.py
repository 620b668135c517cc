"""The commands in process: exit codes, and what a user reads."""

from __future__ import annotations

import pytest
import tiny

from esper.cli.main import main

HERE = ["--store", "store", "--no-prefect"]


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    root = tiny.write_library(tmp_path, replicates=2, horizon=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return root


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["datagen", "--matrix", "tinny"], "did you mean 'tiny'"),
        (["datagen", "--matrix", "tiny", "--env-ids", "tinny"], "did you mean 'tiny'"),
        (["datagen", "--matrix", "tiny", "--policy-ids", "randm"], "did you mean 'random'"),
        (["datagen", "--matrix", "tiny", "--epsilons", "2"], "less than or equal to 1"),
        (["datagen", "--matrix", "tiny", "--workers", "-1"], "workers"),
        (["datagen", "--matrix", "tiny", "--dataset", "No Name"], "dataset"),
        (["datagen", "--matrix", "tiny", "--run-name", "../up"], "run_name"),
        (["pipeline", "demmo"], "did you mean 'demo'"),
        (["pipeline", "demo", "--matrix", "tinny"], "did you mean 'tiny'"),
        (["evaluate", "tiny", "--pipeline", "demmo"], "did you mean 'demo'"),
        (["health", "nothing"], "unknown dataset 'nothing'"),
        (["train", "bc", "nothing"], "unknown dataset 'nothing'"),
        (["report", "nothing"], "unknown dataset 'nothing'"),
    ],
)
def test_a_wrong_name_or_option_exits_with_2_says_what_and_writes_nothing(command, hint, capsys, tmp_path):
    assert main([*command, "--store", "store"]) == 2  # with Prefect: known before a server is started
    assert hint in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('name = "bad"\ncells = []\n', "no cells"),
        (
            'name = "bad"\n[[cells]]\nenvironment = "tiny"\nreward = "tiny"\nreplicates = 1\nbehaviors = []\n',
            "behaviours",
        ),
        ('name = "bad"\n[[cells]]\nenvironment = "tinny"\nreward = "tiny"\nreplicates = 1\n', "did you mean 'tiny'"),
        ('name = "bad', "not valid TOML"),
    ],
)
def test_a_bad_matrix_file_exits_with_2_and_says_what_is_wrong(text, hint, capsys, library):
    (library / "matrices" / "bad.toml").write_text(text)
    assert main(["datagen", "--matrix", "datasets/matrices/bad.toml", *HERE]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate", "tiny", "--policy", "gone"], ["train", "ppo", "--from", "gone"]])
def test_a_missing_checkpoint_exits_with_1_before_anything_runs(command, capsys, tmp_path):
    assert main([*command, *HERE]) == 1
    assert "no checkpoint at gone" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_exits_with_1_and_one_message(capsys, tmp_path):
    (tmp_path / "store").touch()
    assert main(["datagen", "--matrix", "tiny", *HERE]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write")
    assert "Traceback" not in said


def test_a_dry_run_prints_the_cost_and_writes_nothing(capsys, tmp_path):
    assert main(["datagen", "--matrix", "tiny", "--dry-run", "--store", "store"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["8", "2", "32", "8"]
    assert "not run yet" in lines[4]
    assert not (tmp_path / "store").exists()


def test_generated_checked_and_refused_data_each_say_what_comes_next(capsys):
    assert main(["datagen", "--matrix", "tiny", "--workers", "0", *HERE]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: esper health tiny@1"
    assert main(["train", "iql", "tiny", *HERE]) == 3
    assert "esper health tiny@1" in capsys.readouterr().err
    # Two behaviours on two environment seeds are too little, and health says so.
    assert main(["health", "tiny", *HERE]) == 3
    said = capsys.readouterr()
    assert "block" in said.out
    assert "tiny@1 is blocked for offline RL" in said.err
    assert main(["datagen", "--matrix", "tiny", "--dry-run", "--store", "store"]) == 0
    assert "not run yet" not in capsys.readouterr().out
