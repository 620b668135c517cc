"""The flows that a Prefect worker runs: plain functions of JSON parameters with JSON results.

Each takes the fields of its command's request and does what the command does. Nothing here is needed by a command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec

from prefect import flow
from prefect.runtime import deployment, flow_run

from esper.karn.store import open_store
from esper.karn.verdict_text import levels
from esper.karn.versions import Version
from esper.leyline.schedules import ServedFlow
from flows import health as health_flow
from flows.datagen import DatagenRequest, run_datagen
from flows.evaluation import RESULT as COMPARISON
from flows.evaluation import EvaluateRequest, run_evaluation
from flows.grid import RESULT as TRAINING
from flows.grid import TrainRequest, run_training
from flows.prefect_flows import PrefectOrchestrator
from flows.remote import run_block
from flows.secrets import mask_logs, masked_errors
from flows.workers import DEVICES_VARIABLE, running_here

Answer = dict[str, Any]
Parameters = ParamSpec("Parameters")

RETRY_AFTER_S = 30
NAME_LENGTH = 32


def _scheduled_name() -> str:
    """What a run is called: its deployment and the time for which it was planned (UTC)."""
    planned = flow_run.scheduled_start_time
    return f"{flow_run.flow_name}/{deployment.name or 'by-hand'} {planned:%Y-%m-%d %H:%M:%S}"


def _served(
    name: str, *, retries: int, run_name: Callable[[], str] | None = _scheduled_name
) -> Callable[[Callable[Parameters, Answer]], Any]:
    """Return a decorator: a flow whose process ends with its worker, and whose errors and logs are masked."""

    def decorate(function: Callable[Parameters, Answer]) -> Any:
        @wraps(function)
        def body(*arguments: Parameters.args, **named: Parameters.kwargs) -> Answer:
            mask_logs()
            with running_here(), masked_errors():
                return function(*arguments, **named)

        make = flow(
            name=str(name),
            flow_run_name=run_name,
            retries=retries,
            retry_delay_seconds=RETRY_AFTER_S,
            persist_result=True,
            result_serializer="json",
        )
        return make(body)

    return decorate


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something, on the devices of this worker's slot unless they or a pool are named."""
    given = {key: value for key, value in fields.items() if value is not None}
    slot = os.environ.get(DEVICES_VARIABLE, "").split()
    if slot and not {"devices", "pool"} & given.keys():
        given = {**given, "devices": slot, "workers": None}
    return given


@_served(ServedFlow.DATAGEN, retries=1)
def datagen(
    matrix: str,
    dataset: str | None = None,
    store: str | None = None,
    workers: int | None = None,
    devices: list[str] | None = None,
    numerics: str | None = None,
    max_lineages: int | None = None,
    selection: dict[str, Any] | None = None,
    retry_failed: bool = False,
    health: bool = False,
    pool: str | None = None,
    batch_size: int | None = None,
    run_name: str | None = None,
) -> Answer:
    """Generate what a matrix plans and the store does not hold, and seal it; see `esper datagen`."""
    request = DatagenRequest.parse(_given(locals()), "datagen")
    request.check()
    generated = run_datagen(request, PrefectOrchestrator(request.workers))
    return {
        "version": generated.version.ref,
        "digest": generated.version.manifest.digest,
        "sealed": generated.sealed,
        "new_episodes": generated.new_episodes,
        "failed_episodes": generated.failed_episodes,
    }


@_served(ServedFlow.HEALTH, retries=0)
def health(dataset: str, store: str | None = None, once: bool = False, run_name: str | None = None) -> Answer:
    """Check a version; `once` leaves out one that has a verdict. See `esper health`."""
    version = open_store(store).resolve(dataset)
    stored = version.verdict() if once else None
    if stored is not None:
        return {"version": version.ref, "skipped": "has a verdict already", **levels(stored)}
    request = health_flow.HealthRequest.parse(
        {"dataset": version.ref, "store": store, "workers": 0, "run_name": run_name}, "health"
    )
    checked = health_flow.run_health(request, PrefectOrchestrator(1))
    return {"version": version.ref, **levels(checked.verdict)}


@_served(ServedFlow.TRAIN, retries=1)
def train(
    dataset: str,
    store: str | None = None,
    algorithm: str | None = None,
    grid: str | None = None,
    recipe: str | None = None,
    seeds: list[int] | None = None,
    workers: int | None = None,
    devices: list[str] | None = None,
    run_name: str | None = None,
    once: bool = False,
) -> Answer:
    """Train on a version; `once` leaves out one that this deployment has trained on. See `esper train`."""
    version = open_store(store).resolve(dataset)
    run_name = run_name or (_run_name(version) if once else None)
    if once and _is_there(version, run_name, TRAINING):
        return {"version": version.ref, "skipped": f"was trained on already, run {run_name}"}
    fields = {key: value for key, value in locals().items() if key not in ("version", "once")}
    return _train(version, fields)


def _train(version: Version, fields: Mapping[str, Any]) -> Answer:
    request = TrainRequest.parse({**_given(fields), "dataset": version.ref}, "train")
    request.check()
    table = run_training(request, PrefectOrchestrator(request.workers)).table
    return {
        "version": version.ref,
        "run": table.run,
        "policies": {row.policy.name: row.policy.path for row in table.rows},
    }


@_served(ServedFlow.EVALUATE, retries=1)
def evaluate(
    dataset: str,
    policies: list[str],
    pipeline: str = "demo",
    store: str | None = None,
    workers: int | None = None,
    devices: list[str] | None = None,
    run_name: str | None = None,
) -> Answer:
    """Compare checkpoints with every control. See `esper evaluate`."""
    request = EvaluateRequest.parse(_given(locals()), "evaluate")
    request.check()
    return _evaluate(request)


def _evaluate(request: EvaluateRequest) -> Answer:
    evaluation, path = run_evaluation(request, PrefectOrchestrator(request.workers))
    page = path.with_suffix(".md")
    failed = [f"{item.environment}: {item.name}" for item in evaluation.failed_controls]
    return {"version": f"{evaluation.dataset}@{evaluation.version}", "comparison": str(page), "failed_controls": failed}


@_served(ServedFlow.TRAIN_AND_EVALUATE, retries=1)
def train_and_evaluate(
    dataset: str,
    pipeline: str = "demo",
    store: str | None = None,
    algorithm: str | None = None,
    grid: str | None = None,
    recipe: str | None = None,
    seeds: list[int] | None = None,
    workers: int | None = None,
    devices: list[str] | None = None,
    run_name: str | None = None,
    once: bool = False,
) -> Answer:
    """Train on a version, compare what came of it with every control, and report, in one run's folder."""
    version = open_store(store).resolve(dataset)
    run_name = run_name or (_run_name(version) if once else None)
    if once and _is_there(version, run_name, COMPARISON):
        return {"version": version.ref, "skipped": f"was compared already, run {run_name}"}
    fields = {key: value for key, value in locals().items() if key not in ("version", "once", "pipeline")}
    trained = _train(version, fields)
    compared = _given({"store": store, "workers": workers, "devices": devices}) | {
        "dataset": version.ref,
        "policies": list(trained["policies"].values()),
        "pipeline": pipeline,
        "run_name": trained["run"],
    }
    from flows.report import ReportRequest, run_report  # draws with matplotlib

    answer = {**trained, **_evaluate(EvaluateRequest.parse(compared, "evaluate"))}
    wanted = ReportRequest(dataset=version.ref, store=store, run_name=trained["run"])
    return {**answer, "report": str(run_report(wanted, PrefectOrchestrator(1)))}


@_served("cohorts", retries=0, run_name=None)
def cohorts(store: str, dataset: str, block: str, names: list[str]) -> Answer:
    """Run a block of cohorts for `esper datagen --pool`; `names` says to people which they are."""
    slot = os.environ.get(DEVICES_VARIABLE, "").split()
    done, failed = run_block(store, dataset, block, slot or None)
    return {"block": block, "done": done, "failed": failed, "cohorts": names}


def _run_name(version: Version) -> str:
    """The name of the run in which this deployment treats a version: the same whenever it is started again."""
    return f"{str(deployment.name or 'once')[:NAME_LENGTH]}-v{version.number}"


def _is_there(version: Version, run_name: str | None, result: str) -> bool:
    return run_name is not None and (version.root / "runs" / run_name / result).is_file()
