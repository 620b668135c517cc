"""A training killed with `kill -9` goes on under its run's name and ends with the bytes of one that was not."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import learning
import pytest

from esper.cli.main import main
from esper.simic import training

PATIENCE_S = 300

DYING = """
import os, signal, sys
from esper.cli.main import main
from esper.simic import training
training.STORE_EVERY_STEPS = 20
save = training.Progress.save

def save_and_die(self, phase, step, parts, *, last=False):
    save(self, phase, step, parts, last=last)
    if [phase, str(step)] == sys.argv[1:3]:
        os.kill(os.getpid(), signal.SIGKILL)

training.Progress.save = save_and_die
main(sys.argv[3:])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    learning.write_store(tmp_path)


def command(algorithm: str, run: str, workers: int = 0) -> list[str]:
    here = ["--store", "store", "--no-prefect", "--workers", str(workers), *learning.REASON]
    alone = ["--live-env-seeds", "0"] if algorithm == "imitate" else []
    return ["train", algorithm, "small", "--run-name", run, *here, *alone]


def digests(algorithm: str, run: str) -> dict[str, str]:
    checkpoint = Path("store/small/runs") / run / "checkpoints" / algorithm
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}


def goes_on_to_the_same_bytes(algorithm: str) -> None:
    progress = Path("store/small/runs/killed/progress")
    assert progress.exists()
    assert not Path("store/small/runs/killed/checkpoints").exists()
    assert main(command(algorithm, "killed")) == 0
    assert not progress.exists()
    assert main(command(algorithm, "whole")) == 0
    assert digests(algorithm, "killed") == digests(algorithm, "whole")
    assert set(digests(algorithm, "whole")) == {"policy.json", "policy.safetensors", "README.md"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("algorithm", "phase", "step"),
    [
        ("iql", "values", 27),
        ("iql", "policy", 40),
        pytest.param("cql", "policy", 59, marks=pytest.mark.slow),
        pytest.param("iql", "values", 60, marks=pytest.mark.slow),
        pytest.param("bc", "policy", 60, marks=pytest.mark.slow),
        pytest.param("imitate", "policy", 33, marks=pytest.mark.slow),
    ],
)
def test_killed_after_any_step_of_a_phase_it_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, capsys, algorithm, phase, step
):
    learning.write_recipes(tmp_path, steps=60, log_every=10)
    run = [sys.executable, "-c", DYING, phase, str(step), *command(algorithm, "killed")]
    killed = subprocess.run(run, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    starts = []
    restore = training.Progress.restore

    def noting(self, phase, parts):
        starts.append((phase, restore(self, phase, parts)))
        return starts[-1][1]

    monkeypatch.setattr(training.Progress, "restore", noting)
    goes_on_to_the_same_bytes(algorithm)
    resumed = dict(starts[: len(starts) // 2])
    assert resumed[phase] == (step if step == 60 else step // 20 * 20)
    assert resumed.get("values", 60) == 60 or phase == "values"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_parent_killed_from_outside_takes_its_worker_along_and_the_run_goes_on(tmp_path):
    learning.write_recipes(tmp_path, steps=1000, log_every=100)
    stored = Path("store/small/runs/killed/progress/iql/policy.safetensors")
    run = [sys.executable, "-m", "esper.cli.main", *command("iql", "killed", workers=1)]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + PATIENCE_S
        while not stored.exists() and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(parent.pid, signal.SIGKILL)
    time.sleep(1.0)  # the worker ends with its parent
    before = stored.read_bytes()
    time.sleep(1.0)
    assert stored.read_bytes() == before
    goes_on_to_the_same_bytes("iql")
