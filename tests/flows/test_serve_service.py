"""A service on a real Prefect server: deployments, a schedule that fires, triggers, blocks of cohorts, no secrets."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import yaml
from learning import write_store
from test_health_flow import verdict

from esper.karn.store import open_store
from esper.leyline.comparison import ArmResult, Evaluation, Interval
from esper.leyline.errors import SpecError
from esper.leyline.schedules import ServiceSpec, StoreEvent
from esper.leyline.verdict import Level
from flows import remote
from flows.context import open_context
from flows.homes import ServerError, held, say_who_holds
from flows.serve import ServeOptions, serving

SECRET = "wJalrXUtnFEMI-very-secret"
POLL_S = 0.2


def service(**changes) -> ServiceSpec:
    deployments = [
        {"name": "often", "flow": "health", "interval_s": 30.0, "parameters": {"dataset": "small"}},
        {
            "name": "nightly",
            "flow": "datagen",
            "cron": "0 2 * * *",
            "parameters": {"matrix": "tiny"},
            "tags": ["night"],
        },
        {"name": "on-sealed", "flow": "health", "on": "version.sealed", "pool": "idle"},
        {
            "name": "on-passed",
            "flow": "train",
            "on": "verdict.passed",
            "parameters": {"algorithm": "bc"},
            "pool": "idle",
        },
    ]
    return ServiceSpec.parse({"name": "test", "pools": {"cpu": 2, "idle": 1}, "deployments": deployments} | changes)


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def verdict_of(version, level):
    mine = {"dataset": version.name, "version": version.number, "digest": version.manifest.digest}
    return verdict(level).model_copy(update=mine)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with the service registered, no worker, and a version that has a verdict."""
    from flows.server import running_server

    folder = tmp_path_factory.mktemp("served")
    version = write_store(folder)
    version.write_verdict(verdict_of(version, Level.PASS))
    store = open_store(folder / "store")
    with running_server(store.root / ".prefect") as server, pytest.MonkeyPatch.context() as patch:
        from flows.registering import register

        patch.setenv("PROBE_TOKEN", SECRET)
        register(service(), store.place.url, folder)
        yield SimpleNamespace(folder=folder, store=store, version=version, url=server.url)


def client():
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def runs_of(deployment: str) -> list:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    with client() as api:
        found = api.read_deployment_by_name(deployment)
        return api.read_flow_runs(
            flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[found.id]))
        )


def test_the_scheduler_plans_the_runs_of_an_interval(served):
    """With a SQLAlchemy that Prefect does not know, schedules never fire and nobody is told."""
    runs = wait_for(
        lambda: [run for run in runs_of("health/often") if run.auto_scheduled][2:] and runs_of("health/often"), 60
    )
    assert runs, "the scheduler planned nothing"
    times = sorted(run.expected_start_time for run in runs)
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(times)} == {30.0}


def test_what_is_registered_has_json_parameters_schedules_tags_and_slots(served):
    with client() as api:
        nightly = api.read_deployment_by_name("datagen/nightly")
        assert nightly.parameters == {"matrix": "tiny", "store": str(served.folder / "store")}
        assert [item.schedule.cron for item in nightly.schedules] == ["0 2 * * *"]
        assert {"esper", "datagen", "night"} <= set(nightly.tags)
        assert nightly.entrypoint == "flows.deployments.datagen"
        assert api.read_deployment_by_name("cohorts/cpu").work_pool_name == "cpu"
        assert (api.read_work_pool("cpu").concurrency_limit, api.read_work_pool("cpu").type) == (2, "process")


def test_an_event_starts_its_flow_on_its_version_and_a_blocked_verdict_starts_nothing(served):
    from flows.automations import announce, announce_verdict

    elsewhere = open_store(served.folder / "elsewhere")
    under_prefect = SimpleNamespace()
    announce(StoreEvent.SEALED, served.version, elsewhere, under_prefect)
    announce_verdict(served.version, verdict(Level.BLOCK), served.store, under_prefect)
    announce(StoreEvent.SEALED, served.version, served.store, under_prefect)
    announce_verdict(served.version, verdict(Level.WARN), served.store, under_prefect)
    for name in ("health/on-sealed", "train/on-passed"):
        assert wait_for(lambda name=name: runs_of(name), 20), f"no event reached {name}"
        (run,) = runs_of(name)
        assert (run.parameters["dataset"], run.parameters["once"]) == ("small@1", True)


def test_a_flow_started_by_an_event_leaves_a_version_that_was_treated_alone(served):
    from flows import deployments

    answer = deployments.health(dataset="small@1", store=str(served.folder / "store"), once=True)
    assert answer["skipped"] == "has a verdict already"
    assert answer["offline-rl"] == "pass"
    run = served.version.root / "runs" / "once-v1"
    run.mkdir(parents=True)
    (run / "training.json").write_text("{}")
    answer = deployments.train(dataset="small", store=str(served.folder / "store"), algorithm="bc", once=True)
    assert answer == {"version": "small@1", "skipped": "was trained on already, run once-v1"}


def test_the_results_of_served_flows_are_stored_as_json(served):
    from flows import deployments

    answer = deployments.health(dataset="small@1", store=str(served.folder / "store"), once=True)
    stored = [path for path in (served.store.root / ".prefect" / "storage").rglob("*") if path.is_file()]
    assert answer in [json.loads(path.read_text()) for path in stored]


def test_no_secret_reaches_states_logs_or_artifacts(served):
    from prefect import get_run_logger

    from flows.artifacts import publish
    from flows.context import RunOptions
    from flows.prefect_flows import run_as_flow

    def core(request, orchestrator):
        get_run_logger().warning("logged %s", SECRET)
        publish("leaky", f"shown {SECRET} s3://user:pass@host/x", SECRET)
        raise SpecError(f"failed at https://me:{SECRET}@host/?token=abc")

    with pytest.raises(SpecError) as raised:
        run_as_flow("leaky", RunOptions(), core)
    assert SECRET not in str(raised.value)
    with client() as api:
        (run,) = [item for item in api.read_flow_runs() if item.name.startswith("leaky-")]
        logs = wait_for(lambda: [item.message for item in api.read_logs() if item.flow_run_id == run.id], 15)
        (artifact,) = [item for item in api.read_artifacts() if item.key == "leaky"]
    told = json.dumps([run.state.message, logs, artifact.data, artifact.description])
    assert "logged ***" in told
    assert "shown *** s3://***@host/x" in told
    assert SECRET not in told
    assert "abc" not in told


def evaluation_of_one_arm() -> Evaluation:
    def about(mean):
        return Interval(mean=mean, low=mean - 1, high=mean + 1, num_env_seeds=20, method="BCa")

    arm = ArmResult(
        environment="digits-gap",
        arm="iql",
        group="learned",
        test_accuracy_percent=about(40),
        mean_return=about(1),
        gain_over={},
        return_over={},
        seed_params=100,
        growth_factor=1.2,
        train_gflops=3.0,
        num_diverged=0,
    )
    at = "2026-01-01T00:00:00+00:00"
    return Evaluation(
        dataset="small",
        version=1,
        verdict=Level.PASS,
        arms=(arm,),
        best_fixed=(),
        controls=(),
        created_at=at,
        wall_s=1.0,
    )


def test_a_comparison_and_the_place_of_its_report_are_shown_by_the_run_that_made_them(served):
    from flows import report
    from flows.artifacts import publish_comparison
    from flows.context import RunOptions
    from flows.prefect_flows import run_as_flow

    run = served.version.root / "runs" / "compared"
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps(evaluation_of_one_arm().model_dump(mode="json")))

    def core(request, orchestrator):
        publish_comparison(evaluation_of_one_arm(), run / "evaluation.md")
        wanted = report.ReportRequest(dataset="small@1", store=str(served.store.root), run_name="compared")
        return report.run_report(wanted, orchestrator)

    page = run_as_flow("compared", RunOptions(), core)
    assert page.is_file()
    with client() as api:
        shown = {item.key: item for item in api.read_artifacts() if item.key}
    assert f"`{page.resolve()}`" in shown["files-small-1-report"].data
    assert "iql" in next(item.data for key, item in shown.items() if key.startswith("comparison-"))


def test_a_credentials_block_becomes_the_environment_of_workers_and_no_error_repeats_it(served):
    from prefect.blocks.system import Secret

    from flows.secrets import block_environment

    Secret(value={"PROBE_ACCESS_KEY": SECRET}).save("creds", _sync=True)
    Secret(value=SECRET).save("plain", _sync=True)
    assert block_environment("creds") == {"PROBE_ACCESS_KEY": SECRET}
    for name, says in (("plain", "holds no variables"), ("gone", "no secret block"), ("s3/x", "no known kind")):
        with pytest.raises(SpecError, match=says) as raised:
            block_environment(name)
        assert SECRET not in str(raised.value)


# ---- blocks of cohorts: this thread coordinates, another one plays the workers


@contextmanager
def playing_workers(*, crash):
    """Run what is scheduled for cohorts/idle here; where `crash(names)` says so, the run dies half way."""
    from prefect.states import Completed, Crashed, Running

    over = threading.Event()

    def play():
        while not over.wait(POLL_S):
            for run in runs_of("cohorts/idle"):
                if run.state.is_scheduled():
                    with client() as api:
                        api.set_flow_run_state(run.id, Running(), force=True)
                        dies = crash(run.parameters["names"])
                        if not dies:
                            p = run.parameters
                            remote.run_block(p["store"], p["dataset"], p["block"], None)
                        api.set_flow_run_state(run.id, Crashed(message="killed") if dies else Completed(), force=True)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_block_whose_worker_died_is_handed_out_again_and_a_cohort_that_kills_every_worker_fails_alone(
    served, tmp_path, monkeypatch
):
    from esper.tolaria import workers as pools
    from flows.context import RunOptions

    monkeypatch.setattr(remote, "POLL_S", POLL_S)
    monkeypatch.setattr(pools.CohortPool.__init__, "__kwdefaults__", {"engine": stand_in.synthetic, "devices": None})
    deaths: list[str] = []

    def crash(names):
        dies = "digits-gap/1" in names or not deaths
        deaths.extend(names if dies else [])
        return dies

    plans = stand_in.plans(4)
    options = RunOptions(store=str(tmp_path / "store"), workers=0, run_name="r")
    request = SimpleNamespace(pool="idle", batch_size=2)
    with (
        playing_workers(crash=crash),
        open_context(options, "demo", "datagen", SimpleNamespace(), events={}) as context,
    ):
        outcomes = dict(remote.run_blocks(context, request, plans))
        names = context.dataset.place.names("blocks")
    assert set(outcomes) == {0, 1, 2, 3}
    assert [outcomes[i].episodes for i in (0, 2, 3)] == [2, 2, 2]
    assert "digits-gap/1: lost 3 times with its run" in str(outcomes[1])
    assert len(context.dataset.episode_ids()) == 6
    assert names == []


def test_a_changed_service_takes_the_place_of_the_earlier_one(served):
    """The last test: it takes the deployments of the others away."""
    from flows.registering import register

    register(service(deployments=[]), served.store.place.url, served.folder)
    with client() as api:
        assert {item.name for item in api.read_deployments()} == {"cpu", "idle"}
        names = {item.name for item in api.read_automations()}
    assert not any(name.startswith("esper: health") for name in names)
    assert "esper: end runs that fell silent" in names


# ---- without a server


def test_a_second_serve_on_a_store_is_refused_with_the_process_and_address_of_the_first(tmp_path):
    home = tmp_path / "store" / ".prefect"
    with held(home) as ours:
        assert ours
        say_who_holds(home, "serve", "http://127.0.0.1:4242/api")
        with (
            pytest.raises(ServerError, match=r"has this store already: process \d+, http://127.0.0.1:4242/api"),
            serving(ServeOptions(store=str(tmp_path / "store")), print),
        ):
            pass


def test_a_command_sends_several_heartbeats_before_its_machine_is_taken_for_gone(tmp_path):
    from flows.automations import SILENT_AFTER_S
    from flows.server import settings

    assert 3 * int(settings(tmp_path)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) < SILENT_AFTER_S


@pytest.mark.parametrize(
    ("deployment", "says"),
    [
        ({"name": "x", "flow": "health", "cron": "0 2 * * *", "interval_s": 5}, "expected one of cron"),
        (
            {"name": "x", "flow": "health", "on": "version.sealed", "parameters": {"dataset": "a"}},
            "leave `dataset` out",
        ),
        ({"name": "x", "flow": "datagen", "on": "version.sealed"}, "started by a schedule"),
        ({"name": "x", "flow": "health", "pool": "tpu"}, "unknown pool 'tpu'"),
        ({"name": "x", "flow": "heath"}, "heath"),
        ({"name": "../x", "flow": "health"}, "pattern"),
    ],
)
def test_a_service_that_cannot_be_is_refused(deployment, says):
    with pytest.raises(SpecError, match=says):
        service(deployments=[deployment])


def test_parameters_that_a_flow_does_not_take_are_refused_with_the_nearest(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="s"\n[[deployments]]\nname="n"\nflow="datagen"\nparameters={matrix="tiny", max_linages=3}\n')
    with pytest.raises(SpecError, match="did you mean 'max_lineages'"):
        ServeOptions(config=str(path)).check()


def test_prefect_yaml_names_flows_that_take_its_parameters():
    from prefect.flows import load_flow_from_entrypoint

    root = Path(__file__).parents[2]
    spec = yaml.safe_load((root / "prefect.yaml").read_text())
    for deployment in spec["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"])
        assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties), deployment["name"]
        assert deployment["work_pool"]["name"] in ("cpu", "gpu")
    served_by_default = {item.full_name for item in ServeOptions().check().deployments}
    assert served_by_default <= {
        f"{load_flow_from_entrypoint(item['entrypoint']).name}/{item['name']}" for item in spec["deployments"]
    }
