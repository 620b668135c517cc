"""Several machines against one server and one store, one of them lost in the middle; the service from end to end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
from factories import synthetic_tables
from learning import write_recipes
from s3_server import BUCKET, environment_of, s3_server
from test_kill_and_resume import _children as living

from esper.karn.store import open_store
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.schedules import ServiceSpec

pytestmark = pytest.mark.slow

RULES = ("baseline", "random", "quick-culler", "aggressive", "anti-kasmina", "schedule-sampler", "never-act")
ESPER = [sys.executable, "-m", "esper.cli.main"]
SERVICE = """
name = "test"
[pools]
cpu = 2
[[deployments]]
name = "once"
flow = "datagen"
interval_s = 3600
parameters = { matrix = "tiny", workers = 0 }
[[deployments]]
name = "often"
flow = "health"
interval_s = 60
parameters = { dataset = "good" }
[[deployments]]
name = "on-sealed"
flow = "health"
on = "version.sealed"
[[deployments]]
name = "on-passed"
flow = "train"
on = "verdict.passed"
parameters = { algorithm = "bc", workers = 0 }
"""


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def start(
    folder: Path, name: str, *arguments: str, inside: tuple[str, ...] = (), variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*inside, *ESPER, *arguments], cwd=folder, env=os.environ | (variables or {}), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def api_of(folder: Path) -> str:
    assert wait_for(lambda: "workers:" in said(folder, "serve"), 400), said(folder, "serve")
    return re.search(r"API (\S+)", said(folder, "serve"))[1]


@pytest.fixture
def folder(tmp_path):
    write_recipes(tmp_path)
    tiny.write_library(tmp_path, replicates=8, horizon=40)
    (tmp_path / "service.toml").write_text(SERVICE)
    (tmp_path / "pools.toml").write_text('name = "pools"\n[pools]\ncpu = 2\n')
    return tmp_path


def _ip(*arguments: str) -> bool:
    command = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return (
        command is not None and subprocess.run([command, *arguments], capture_output=True, check=False).returncode == 0
    )


class Machine:
    """A worker machine: a network namespace with a link of its own to the server, else plain processes."""

    def __init__(self, number: int) -> None:
        self.name, self.link = f"esper-{os.getpid()}-{number}", f"es{os.getpid() % 10000}x{number}"
        self.host, own = f"10.213.{number}.1", f"10.213.{number}.2"
        self.inside: tuple[str, ...] = ()
        if not _ip("netns", "add", self.name):
            self.host = "127.0.0.1"
            return
        steps = (
            ("link", "add", self.link, "type", "veth", "peer", "name", f"{self.link}p"),
            ("link", "set", f"{self.link}p", "netns", self.name),
            ("addr", "add", f"{self.host}/24", "dev", self.link),
            ("link", "set", self.link, "up"),
            ("netns", "exec", self.name, "ip", "addr", "add", f"{own}/24", "dev", f"{self.link}p"),
            ("netns", "exec", self.name, "ip", "link", "set", f"{self.link}p", "up"),
            ("netns", "exec", self.name, "ip", "link", "set", "lo", "up"),
        )
        assert all(_ip(*step) for step in steps)
        self.inside = (shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin"), "netns", "exec", self.name)

    def pids(self, session: int) -> list[int]:
        if not self.inside:
            return living(session)
        done = subprocess.run([*self.inside[:2], "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    def close(self) -> None:
        if self.inside:
            _ip("netns", "del", self.name)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    made = [Machine(1), Machine(2)]
    yield made
    for machine in made:
        machine.close()


class Shared:
    """A store that all machines reach: a folder, or a prefix of an S3 server with a local copy for each machine."""

    def __init__(self, folder: Path, s3_port: int | None) -> None:
        self.folder, self.s3_port = folder, s3_port
        self.url = "shared" if s3_port is None else f"s3://{BUCKET}/shared"

    def variables(self, host: str, machine: str) -> dict[str, str]:
        """What a machine's commands find in their environment."""
        if self.s3_port is None:
            return {}
        return environment_of(f"http://{host}:{self.s3_port}", self.folder / "caches" / machine)

    def machines_at_work(self) -> int:
        """How many machines have begun a cohort."""
        return len(list(self.folder.glob("**/tiny/runs/*/events-*-*.jsonl")))


@pytest.fixture(params=["disk", "s3"])
def shared(request, folder, monkeypatch) -> Iterator[Shared]:
    if request.param == "disk":
        yield Shared(folder, None)
        return
    with s3_server("0.0.0.0") as endpoint:
        made = Shared(folder, int(endpoint.rpartition(":")[2]))
        for name, value in made.variables("127.0.0.1", "test").items():
            monkeypatch.setenv(name, value)
        yield made


def test_two_machines_share_a_matrix_and_when_one_is_lost_in_mid_cohort_the_other_ends_it(folder, machines, shared):
    clean = subprocess.run(
        [*ESPER, "datagen", "--matrix", "tiny", "--store", "clean", "--workers", "0", "--no-prefect", "--no-health"],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert clean.returncode == 0, clean.stderr
    here = shared.variables("127.0.0.1", "here")
    exposed = ["--host", "0.0.0.0", "--expose", "--port", "0", "--workers", "0"]
    options = ["serve", "--store", shared.url, "--config", "pools.toml", *exposed]
    started = [start(folder, "serve", *options, variables=here)]
    try:
        port = re.search(r":(\d+)/api", api_of(folder))[1]
        for number, machine in enumerate(machines, 1):
            api, name = f"http://{machine.host}:{port}/api", f"machine{number}"
            role = ("serve", "--role", "worker", "--api", api, "--pool", "cpu", "--limit", "1")
            variables = shared.variables(machine.host, name)
            started.append(start(folder, name, *role, inside=machine.inside, variables=variables))
        run = ["datagen", "--matrix", "tiny", "--store", shared.url, "--pool", "cpu", "--batch-size", "2"]
        coordinator = start(folder, "datagen", *run, "--no-health", variables=here)
        started.append(coordinator)
        assert wait_for(lambda: shared.machines_at_work() >= 2, 400), said(folder, "datagen")
        time.sleep(1)
        lost = machines[0].pids(started[1].pid)
        assert len(lost) >= 3, "supervisor, worker and flow run"
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        assert coordinator.wait(timeout=900) == 0, said(folder, "datagen")
    finally:
        for process in reversed(started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=120)
    found, alone = (open_store(where).resolve("tiny@1") for where in (_where(folder, shared), folder / "clean"))
    ids = found.table("episodes", columns=["episode_id"])["episode_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 32
    assert found.manifest.digest == alone.manifest.digest
    assert found.verify() == []
    assert "no heartbeat" in said(folder, "serve") or "its process was killed" in said(folder, "serve")
    assert "Traceback" not in said(folder, "serve") + said(folder, "machine2") + said(folder, "datagen")


def _where(folder: Path, shared: Shared) -> str | Path:
    return folder / "shared" if shared.s3_port is None else shared.url


def sealed_that_passes(folder: Path) -> None:
    dataset = open_store(folder / "store").dataset("good")
    dataset.commit(synthetic_tables(num_env_seeds=4, horizon=12, behaviours=RULES, refusal_rate=0.1))
    rewards = {"digits-gap": load("rewards", "digits-gap", RewardSpec).model_dump(mode="json")}
    dataset.seal(matrix_id="m", provenance={"rewards": rewards})


def test_a_clock_and_events_start_flows_a_killed_worker_is_replaced_and_nothing_outlives_the_service(folder):
    """A schedule fires, its verdict starts a training, once; a sealed version starts health, a blocked one nothing."""
    sealed_that_passes(folder)
    store = folder / "store"
    server = start(
        folder, "serve", "serve", "--store", "store", "--config", "service.toml", "--port", "0", "--workers", "2"
    )

    def told(pattern: str, seconds: float) -> list[str]:
        return wait_for(lambda: re.findall(pattern, said(folder, "serve")), seconds)

    def run_by_hand(deployment: str) -> None:
        command = [sys.executable, "-m", "prefect", "deployment", "run", deployment]
        subprocess.run(command, env=os.environ | {"PREFECT_API_URL": api}, check=True, capture_output=True)

    try:
        api = api_of(folder)
        again = subprocess.run(
            [*ESPER, "serve", "--store", "store", "--port", "0"], cwd=folder, capture_output=True, check=False
        )
        assert again.returncode == 1
        assert f"process {server.pid}, {api}" in again.stderr.decode()

        assert told(r"ended  health/often .* Completed", 400), said(folder, "serve")
        assert told(r"ended  train/on-passed .* Completed", 400), said(folder, "serve")
        training = store / "good" / "runs" / "on-passed-v1" / "training.json"
        trained_at = training.stat().st_mtime_ns
        assert wait_for(lambda: len(told(r"ended  train/on-passed .* Completed", 1) or []) >= 2, 400)
        assert training.stat().st_mtime_ns == trained_at, "a version was trained on twice"

        run_by_hand("datagen/once")
        running = store / ".prefect" / "running"
        assert told(r"began  datagen/once", 400), said(folder, "serve")
        assert wait_for(lambda: list(running.glob("*")), 60)
        for worker in _children_named(server.pid, "worker"):
            os.kill(worker, signal.SIGKILL)
        assert told(r"ended  datagen/once .* Crashed", 120), said(folder, "serve")
        assert "worker cpu-1 ended with code -9; it is started again" in said(folder, "serve")

        run_by_hand("datagen/once")
        assert told(r"ended  health/on-sealed .* Completed", 420), said(folder, "serve")
        assert open_store(store).resolve("tiny@1").verdict() is not None
        time.sleep(15)
        assert not list((store / "tiny" / "runs").glob("on-passed*")), "a blocked version was trained on"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 0
    assert "Traceback" not in said(folder, "serve")
    assert wait_for(lambda: not _in_folder(folder), 20), "a process outlived the service"


def test_prefect_deploys_what_prefect_yaml_says(tmp_path):
    from flows.server import running_server

    root = Path(__file__).parents[2]
    with running_server(tmp_path / "home") as server:
        from flows.registering import register

        register(ServiceSpec.parse({"name": "pools-alone"}), str(tmp_path), tmp_path)
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(
            command, cwd=root, env=os.environ | {"PREFECT_API_URL": server.url}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            names = {item.name for item in client.read_deployments()}
            automations = [item for item in client.read_automations() if "on-" in item.name]
    assert names == {"nightly", "on-sealed", "on-passed", "weekly", "cpu", "gpu"}
    assert len(automations) == 2


def _children_named(parent: int, word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and word in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _in_folder(folder: Path) -> list[int]:
    """The living processes that work in a folder, or keep Prefect's state in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(folder).encode() in (path / "environ").read_bytes()
            ours = ours or str((path / "cwd").resolve()).startswith(str(folder))
        except OSError:
            continue
        if ours and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found
