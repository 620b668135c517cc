"""Health as a flow: the page and the verdict are stored, who must know is told, and telling never costs the run."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time

import factories
import pytest
import tiny

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from flows.health import HealthRequest, run_health, verdict_markdown
from flows.notify import BLOCK_VARIABLE, URL_VARIABLE, blocked_payload, masked, notify_blocked
from flows.orchestration import LocalOrchestrator


class Receiver:
    """A webhook on the loopback interface: keeps what it is sent and answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                receiver.paths.append(self.path)
                receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/SECRET?token=SECRET"


@contextlib.contextmanager
def receiving(status: int = 200):
    receiver = Receiver(status)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()


@pytest.fixture
def receiver():
    with receiving() as found:
        yield found


@pytest.fixture(autouse=True)
def no_webhook(monkeypatch):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def verdict(level: Level, uses: tuple[Use, ...] = tuple(Use)) -> Verdict:
    check = CheckResult(
        name="action_coverage",
        environment="all",
        level=level,
        value=0.01,
        warn_threshold=0.05,
        block_threshold=0.02,
        message="least is PRUNE | 1 %\n<b>",
        remedy="add epsilon",
        uses=uses,
    )
    fine = CheckResult(name="structure", environment="all", level=Level.PASS, value=0.0, message="whole")
    return Verdict(dataset="demo", version=3, digest="d" * 64, checked_at="2026-01-01T00:00:00Z", checks=(check, fine))


def test_a_blocked_version_is_posted_with_dataset_verdict_failed_checks_and_link(receiver, monkeypatch, tmp_path):
    monkeypatch.setenv(URL_VARIABLE, receiver.url)
    page = tmp_path / "demo@3.html"
    assert notify_blocked(verdict(Level.BLOCK, (Use.OFFLINE_RL,)), page, under_prefect=False)
    assert receiver.paths == ["/hooks/SECRET?token=SECRET"]
    (body,) = receiver.bodies
    assert (body["dataset"], body["version"]) == ("demo", 3)
    assert body["verdict"] == {"imitation": "pass", "offline-rl": "block", "off-policy-evaluation": "pass"}
    assert [check["check"] for check in body["failed_checks"]] == ["action_coverage"]
    assert body["failed_checks"][0]["remedy"] == "add epsilon"
    assert body["link"] == page.as_uri()


@pytest.mark.parametrize("level", [Level.WARN, Level.PASS, Level.REPORT])
def test_nobody_is_told_of_a_version_that_is_not_blocked(level, receiver, monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, receiver.url)
    assert not notify_blocked(verdict(level), None, under_prefect=False)
    assert receiver.bodies == []


def test_without_a_webhook_nothing_is_sent_and_nothing_is_said(capsys):
    assert not notify_blocked(verdict(Level.BLOCK), None, under_prefect=False)
    assert capsys.readouterr() == ("", "")


def test_a_dead_receiver_costs_one_line_that_does_not_give_the_address_away(monkeypatch, capsys):
    monkeypatch.setenv(URL_VARIABLE, f"http://user:SECRET@127.0.0.1:{free_port()}/hooks/SECRET")
    assert not notify_blocked(verdict(Level.BLOCK), None, under_prefect=False)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("warning: the webhook at http://127.0.0.1:")
    assert "SECRET" not in said


def test_a_receiver_that_refuses_costs_one_line_with_its_status(monkeypatch, capsys):
    with receiving(status=503) as refusing:
        monkeypatch.setenv(URL_VARIABLE, refusing.url)
        assert not notify_blocked(verdict(Level.BLOCK), None, under_prefect=False)
    said = capsys.readouterr().err
    assert "status 503" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/SECRET", "SECRET", "http://", "http://[SECRET"])
def test_an_address_that_is_no_web_address_is_never_opened(url, monkeypatch, capsys):
    monkeypatch.setenv(URL_VARIABLE, url)
    assert not notify_blocked(verdict(Level.BLOCK), None, under_prefect=False)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "SECRET" not in said


def test_a_block_without_prefect_is_a_warning(monkeypatch, capsys):
    monkeypatch.setenv(BLOCK_VARIABLE, "alarms")
    assert not notify_blocked(verdict(Level.BLOCK), None, under_prefect=False)
    assert "webhook block 'alarms' needs Prefect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@hooks.example.org:8443/T/B?x=1#y", "https://hooks.example.org:8443/…"),
        ("https://hooks.example.org", "https://hooks.example.org/…"),
        ("http://host:port/secret", "(not an address)"),
    ],
)
def test_a_masked_address_keeps_scheme_host_and_port_alone(url, shown):
    assert masked(url) == shown


def test_a_payload_without_a_page_has_no_link():
    assert blocked_payload(verdict(Level.BLOCK), None)["link"] is None


def test_the_markdown_lists_uses_and_failed_checks_in_cells_that_cannot_break_out(tmp_path):
    text = verdict_markdown(verdict(Level.BLOCK), tmp_path / "p.html")
    assert "- offline-rl: **block**" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| block")]
    assert "PRUNE \\| 1 % &lt;b>" in row
    assert "1 checks pass" in text
    assert "Nothing blocks" in verdict_markdown(verdict(Level.PASS), tmp_path / "p.html")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A dataset of two behaviours: health blocks it."""
    root = tmp_path_factory.mktemp("health-store")
    dataset = open_store(root).dataset("demo")
    dataset.commit(factories.synthetic_tables(num_env_seeds=3))
    reward, environment = load("rewards", "digits-gap", RewardSpec), load("environments", "digits-gap", EnvironmentSpec)
    provenance = {
        "rewards": {"digits-gap": reward.model_dump(mode="json")},
        "environments": {"digits-gap": environment.model_dump(mode="json")},
    }
    dataset.seal(matrix_id="m", provenance=provenance)
    return root


def test_a_check_stores_verdict_page_and_data_docs_and_tells_the_receiver(store, receiver, monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, receiver.url)
    checked = run_health(
        HealthRequest(dataset="demo", store=str(store), run_name="r1", workers=0), LocalOrchestrator(1)
    )
    assert checked.version.verdict() == checked.verdict
    assert checked.page == store / "demo/runs/r1/health/demo@1.html"
    assert "<svg" not in checked.page.read_text()[:200]
    assert (checked.docs / "index.html").is_file()
    assert receiver.bodies == [blocked_payload(checked.verdict, checked.page)]


def test_a_stored_prefect_block_is_the_way_to_the_receiver_and_one_that_is_gone_costs_one_line(
    receiver, monkeypatch, capsys
):
    from prefect.blocks.webhook import Webhook

    def load(name: str, **_: object) -> Webhook:
        if name != "alarms":
            raise ValueError(f"Unable to find block document named {name}")
        return Webhook(url=receiver.url)

    monkeypatch.setattr(Webhook, "load", load)  # blocks lie in a server, which takes half a minute to start
    monkeypatch.setenv(URL_VARIABLE, receiver.url)
    blocking = verdict(Level.BLOCK)
    assert notify_blocked(blocking, None, under_prefect=True)
    monkeypatch.setenv(BLOCK_VARIABLE, "alarms")
    assert notify_blocked(blocking, None, under_prefect=True)
    assert receiver.bodies == 2 * [blocked_payload(blocking, None)]
    monkeypatch.setenv(BLOCK_VARIABLE, "gone")
    assert not notify_blocked(blocking, None, under_prefect=True)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_under_prefect_the_verdict_is_an_artifact_and_both_ways_to_a_webhook_work(
    store, receiver, tmp_path, monkeypatch
):
    from flows.server import loopback_server

    with loopback_server(tmp_path / ".prefect"):
        from prefect.blocks.webhook import Webhook
        from prefect.client.orchestration import get_client

        from flows.prefect_flows import run_as_flow

        Webhook(url=receiver.url).save("alarms", _sync=True)
        request = HealthRequest(dataset="demo", store=str(store), run_name="r2", workers=0)
        monkeypatch.setenv(URL_VARIABLE, receiver.url)
        checked = run_as_flow("health", request, run_health)
        monkeypatch.setenv(BLOCK_VARIABLE, "alarms")
        assert notify_blocked(checked.verdict, checked.page, under_prefect=True)
        monkeypatch.setenv(BLOCK_VARIABLE, "gone")
        assert not notify_blocked(checked.verdict, checked.page, under_prefect=True)
        assert receiver.bodies == 2 * [blocked_payload(checked.verdict, checked.page)]
        with get_client(sync_client=True) as client:
            shown = _artifacts(client, 2)
    assert set(shown) == {"health-demo-1", "files-demo-1"}
    assert shown["health-demo-1"].data == verdict_markdown(checked.verdict, checked.page)
    for place in (checked.page, checked.docs / "index.html"):
        assert place.is_file()
        assert f"`{place.resolve()}`" in shown["files-demo-1"].data
    assert all(item.flow_run_id is not None for item in shown.values())


def _artifacts(client, number):
    deadline = time.monotonic() + 10
    while len(found := client.read_artifacts()) < number and time.monotonic() < deadline:
        time.sleep(0.1)
    return {item.key: item for item in found}


def test_blocked_data_stop_the_pipeline_with_3_keep_the_verdict_and_the_receiver_is_told_with_the_page(
    receiver, tmp_path, monkeypatch, capsys
):
    tiny.write_pipeline(tmp_path, bounds="[-100.0, 100.0]")
    tiny.write_library(tmp_path, replicates=1, horizon=3)  # a matrix of two behaviours
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(URL_VARIABLE, receiver.url)
    command = ["pipeline", "tiny", "--store", "store", "--workers", "0", "--no-prefect", "--run-name", "r1"]
    assert main(command) == 3
    assert "tiny@1 is blocked for offline RL" in capsys.readouterr().err
    assert open_store("store").resolve("tiny@1").verdict() is not None
    assert not (tmp_path / "store/tiny/runs/r1/checkpoints").exists()
    (body,) = receiver.bodies
    page = tmp_path / "store/tiny/runs/r1/health/tiny@1.html"
    assert (body["dataset"], body["link"], body["verdict"]["offline-rl"]) == ("tiny", page.as_uri(), "block")
    assert page.is_file()
