"""A command that is told to end is gone in time, whatever holds it up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_kill_and_resume import _children as living
from test_kill_and_resume import _wait_for as wait_for

from flows.ending import ECHO_S, PATIENCE_S
from flows.homes import holder_of

STUBBORN = """
import sys, time
from pathlib import Path
from flows.ending import ending_when_told
interrupts = 0
with ending_when_told(float(sys.argv[1])):
    while True:
        try:
            if not interrupts:
                Path("ready").touch()  # within the try: the signal may follow at once
            time.sleep(60)
        except KeyboardInterrupt:
            interrupts += 1
            print("interrupt", interrupts, flush=True)
"""


@pytest.fixture
def stubborn(tmp_path):
    """Starts a process that goes on after every interrupt."""
    started = []

    def start(patience_s):
        command = [sys.executable, "-c", STUBBORN, str(patience_s)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        assert wait_for((tmp_path / "ready").exists, 60)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_what_goes_on_after_an_interrupt_is_ended_when_the_patience_is_over(stubborn):
    process = stubborn(1.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - began >= 1.4
    assert process.stdout.read().splitlines() == [
        "interrupt 1",
        "interrupted; did not end within 2 s, ended at once; what was stored stays",
    ]


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(stubborn):
    process = stubborn(600)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "interrupt 1\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * ECHO_S)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert "told twice to end" in process.stdout.read()


@pytest.mark.slow
def test_a_pipeline_whose_server_was_killed_ends_when_told_and_leaves_no_process(tmp_path):
    tiny.write_pipeline(tmp_path, bounds="[-100.0, 100.0]")
    matrix = tmp_path / "datasets" / "matrices" / "tiny.toml"
    matrix.write_text(matrix.read_text().replace("replicates = 3", "replicates = 300"))
    command = [sys.executable, "-m", "esper.cli.main", "pipeline", "tiny", "--store", "store", "--workers", "1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    episodes = tmp_path / "store" / "tiny" / "episodes"
    assert wait_for(lambda: list(episodes.glob("*/*.parquet")), 400), (tmp_path / "log").read_text()
    os.killpg(_server_of(process.pid), signal.SIGKILL)
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    seconds = time.monotonic() - began
    print(f"\nended {seconds:.1f} s after SIGTERM, its server dead")
    assert seconds < PATIENCE_S + 5  # that much for a busy machine
    assert wait_for(lambda: not living(process.pid), 20), "a process outlived its parent"
    assert holder_of(tmp_path / "store" / ".prefect") is None


def _server_of(parent: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"prefect\0server" in (path / "cmdline").read_bytes():
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError("it has no server")
