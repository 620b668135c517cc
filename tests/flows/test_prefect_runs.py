"""A real Prefect server on loopback: what it shows, and that it goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import learning
import pytest
import tiny

from flows.orchestration import Unit
from flows.server import loopback_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with loopback_server(tmp_path_factory.mktemp("prefect") / "store" / ".prefect") as url:
        yield url
    assert not _answers(url), "the server outlived its context"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_a_datagen_flow_run_and_its_cohorts_show_up_in_the_server(server, tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client

    from flows.datagen import DatagenRequest, run_datagen
    from flows.prefect_flows import run_as_flow

    tiny.write_library(tmp_path, replicates=2, horizon=3)
    monkeypatch.chdir(tmp_path)
    request = DatagenRequest(matrix="tiny", store=str(tmp_path / "store"), workers=0)
    assert run_as_flow("datagen", request, run_datagen).new_episodes == 8
    assert _wait_for(lambda: _num_task_runs() == 2, 20)
    with get_client(sync_client=True) as client:
        (flow_run,) = [run for run in client.read_flow_runs() if run.name.startswith("datagen-")]
        tasks = {run.name: run.state_name for run in client.read_task_runs() if run.flow_run_id == flow_run.id}
        (artifact,) = [found for found in client.read_artifacts() if found.key == "datagen-tiny"]
    assert flow_run.state_name == "Completed"
    assert flow_run.parameters["request"]["matrix"] == "tiny"
    assert tasks == {"tiny/0": "Completed", "tiny/1": "Completed"}
    assert artifact.flow_run_id == flow_run.id
    rows = json.loads(artifact.data)
    assert [row["done"] for row in rows] == [row["planned"] for row in rows] == [2, 2, 2, 2]
    assert artifact.description == "8 of 8 episodes done, 0 failed, 0 to go in 0 of 4 cells"


def test_a_task_is_not_tried_again_once_its_unit_says_that_it_is_of_no_use(server):
    from flows.context import RunOptions
    from flows.failures import Tries
    from flows.prefect_flows import run_as_flow

    calls = []

    def fails():
        calls.append(len(calls))
        raise ValueError("always the same")

    def core(request, orchestrator):
        return list(orchestrator.units([Unit("cohort", "again/0", fails, retries=5, again=Tries(6))]))

    ((_, outcome),) = run_as_flow("again", RunOptions(workers=0), core)
    assert str(outcome) == "always the same"
    assert len(calls) == 2


def _num_task_runs(prefix: str = "tiny/") -> int:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return sum(run.name.startswith(prefix) and run.state_name == "Completed" for run in client.read_task_runs())


def test_a_grid_with_two_seeds_is_one_flow_run_with_a_task_run_for_each_policy(server, tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client

    from flows.grid import TrainRequest, run_training
    from flows.prefect_flows import run_as_flow

    monkeypatch.chdir(tmp_path)
    learning.write_recipes(tmp_path)
    learning.write_store(tmp_path)
    grid = learning.write_grid(tmp_path, '[[learners]]\nalgorithm = "bc"\nfields.steps = [2, 4]\n')
    request = TrainRequest(
        dataset="small", grid=grid, seeds=(0, 1), store="store", workers=0, override_health="a test", run_name="r"
    )
    table = run_as_flow("train", request, run_training).table
    names = {f"bc-steps-{steps}-s{seed}" for steps in (2, 4) for seed in (0, 1)}
    assert {row.policy.name for row in table.rows} == names
    assert _wait_for(lambda: _num_task_runs("bc-steps-") == 4, 20)
    with get_client(sync_client=True) as client:
        (flow_run,) = [run for run in client.read_flow_runs() if run.name.startswith("train-")]
        tasks = {run.name for run in client.read_task_runs() if run.flow_run_id == flow_run.id}
    assert tasks == names


def test_a_unit_is_tried_again_by_prefect_and_its_last_error_is_a_result(server, tmp_path):
    from flows.context import RunOptions
    from flows.prefect_flows import run_as_flow

    calls: dict[str, int] = {"heals": 0, "never": 0}

    def heals() -> str:
        calls["heals"] += 1
        if calls["heals"] == 1:
            raise ValueError("once")
        return "healed"

    def never() -> str:
        calls["never"] += 1
        raise ValueError("always")

    def core(request, orchestrator):
        units = [Unit("cohort", "heals", heals, 1), Unit("cohort", "never", never, 1)]
        return dict(orchestrator.stage("inner", partial(list, orchestrator.units(units))))

    outcomes = run_as_flow("outer", RunOptions(workers=2), core)
    assert outcomes[0] == "healed"
    assert str(outcomes[1]) == "always"
    assert calls == {"heals": 2, "never": 2}


PARENT = """
import time
from pathlib import Path
from flows.server import loopback_server
with loopback_server(Path("home/.prefect")) as url:
    Path("url.part").write_text(url)
    Path("url.part").rename("url")
    time.sleep(300)
"""


def test_the_server_is_gone_after_a_kill_of_its_parent_and_holds_none_of_its_pipes(tmp_path):
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, stdout=subprocess.PIPE) as parent:
        assert _wait_for((tmp_path / "url").exists, 90)
        url = (tmp_path / "url").read_text()
        assert _answers(url)
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate(timeout=30)  # hangs where something still holds the pipe
    assert _wait_for(lambda: not _answers(url), 20)


def test_state_lies_in_the_home_that_was_asked_for(server):
    assert (Path(os.environ["PREFECT_HOME"]) / "prefect.db").is_file()
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_without_prefect_it_is_never_imported(tmp_path):
    tiny.write_library(tmp_path, replicates=1, horizon=2)
    code = (
        "import sys\n"
        "from esper.cli.main import main\n"
        "code = main(['datagen', '--matrix', 'tiny', '--store', 's', '--workers', '0', '--no-prefect'])\n"
        "print(code, 'prefect' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
