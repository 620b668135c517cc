"""Real processes, real kills: nothing that was stored is lost, nothing is stored twice, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny

from esper.cli.main import main
from esper.karn.store import open_store

OPTIONS = ["--matrix", "tiny", "--no-prefect", "--no-health"]
DATAGEN = [sys.executable, "-m", "esper.cli.main", "datagen", "--workers", "1", *OPTIONS]


def _start(folder: Path, store: str) -> subprocess.Popen[bytes]:
    with (folder / f"{store}.log").open("ab") as log:
        return subprocess.Popen(
            [*DATAGEN, "--store", store], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def _commits(folder: Path, store: str) -> int:
    return len(list((folder / store / "tiny" / "episodes").glob("environment=*/*.parquet")))


def _children(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def _wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_datagen_killed_in_the_middle_goes_on_and_ends_with_the_same_digest(tmp_path, monkeypatch):
    tiny.write_library(tmp_path, replicates=6, horizon=12)
    killed = _start(tmp_path, "killed")
    assert _wait_for(lambda: _commits(tmp_path, "killed") >= 2, 60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert _wait_for(lambda: not _children(killed.pid), 20), "workers outlived their parent"
    dataset = open_store(tmp_path / "killed").dataset("tiny")
    stored = len(dataset.episode_ids())
    assert 0 < stored < 24
    assert not dataset.versions()
    monkeypatch.chdir(tmp_path)  # the same command in this process: no interpreter to start
    for store in ("killed", "undisturbed"):
        assert main(["datagen", "--workers", "0", *OPTIONS, "--store", store]) == 0
    resumed, clean = (open_store(tmp_path / name).resolve("tiny@1") for name in ("killed", "undisturbed"))
    ids = resumed.table("episodes", columns=["episode_id"])["episode_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 24
    assert resumed.manifest.digest == clean.manifest.digest
    assert resumed.verify() == []


def test_ctrl_c_exits_with_130_says_what_is_stored_and_leaves_no_process(tmp_path):
    tiny.write_library(tmp_path, replicates=40, horizon=20)
    stopped = _start(tmp_path, "stopped")
    assert _wait_for(lambda: _commits(tmp_path, "stopped") >= 1, 60)
    os.killpg(stopped.pid, signal.SIGINT)
    assert stopped.wait(timeout=20) == 130
    said = (tmp_path / "stopped.log").read_text()
    assert "of 40 cohorts are stored" in said
    assert "Traceback" not in said
    assert _wait_for(lambda: not _children(stopped.pid), 10), "a process outlived its parent"
