"""What Prefect costs: the start of a server, a task, and a run of a block on a worker, wall seconds.

Each is measured on a server and a worker of its own in a temporary folder, with work that does nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Record, machine, options, write
from esper.karn.store import open_store
from esper.leyline.schedules import ServiceSpec
from flows.context import RunOptions
from flows.orchestration import LocalOrchestrator, Orchestrator, Unit, results
from flows.server import running_server
from flows.workers import WorkerPlan, Workers

NAME = "service"
UNITS = 100
TIMEOUT_S = 300.0


def record(case: str, seconds: Sequence[float], unit: str, scale: float = 1.0) -> Record:
    """Return and print the median and the range of a case."""
    scaled = [scale * value for value in seconds]
    print(
        f"{case:<44} {statistics.median(scaled):8.2f} {unit}   {min(scaled):.2f} to {max(scaled):.2f}, n {len(scaled)}"
    )
    return {
        "name": NAME,
        "case": case,
        "median": statistics.median(scaled),
        "least": min(scaled),
        "most": max(scaled),
        "n": len(scaled),
        "unit": unit,
        "machine": machine(),
    }


def units(request: RunOptions, orchestrator: Orchestrator) -> float:
    """Carry out units that do nothing; return the seconds of each."""
    started = time.perf_counter()
    results(orchestrator, [Unit("nothing", str(number), lambda: None) for number in range(UNITS)])
    return (time.perf_counter() - started) / UNITS


def block(store: Path) -> float:
    """Hand an empty block to the worker; return the seconds until its run has completed."""
    from prefect.client.orchestration import get_client

    from flows.remote import FOLDER, Block

    dataset = open_store(store).dataset("nothing")
    name = f"block-{time.monotonic_ns()}"
    dataset.place.child(FOLDER).write_over(f"{name}.json", Block(run="r", plans=()).model_dump_json())
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("cohorts/cpu")
        parameters = {"store": str(store), "dataset": "nothing", "block": name, "names": []}
        started = time.perf_counter()
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        while not (state := client.read_flow_run(run.id).state) or not state.is_final():
            if time.perf_counter() - started > TIMEOUT_S:
                raise TimeoutError(f"the block did not end within {TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        if not state.is_completed():
            raise RuntimeError(f"the block ended as {state.name}: {state.message}")
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each, write the records."""
    given = options(__doc__ or "", 3, arguments)
    starts, tasks, blocks, records = [], [], [], []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            with running_server(Path(folder) / "home"):
                starts.append(time.perf_counter() - started)
                from flows.prefect_flows import run_as_flow

                tasks.append(run_as_flow("units", RunOptions(workers=4), units))
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "home") as server:
        from flows.registering import register

        register(ServiceSpec(name="nothing"), folder, Path(folder))
        workers = Workers([WorkerPlan(name="w", pool="cpu")], server.home, server.url, {}, print)
        workers.start()
        try:
            block(Path(folder))  # until the worker is there
            blocks = [block(Path(folder)) for _ in range(2 * given.rounds)]
        finally:
            workers.stop()
    records.append(record("server, from start to ready", starts, "s"))
    records.append(record("task under Prefect", tasks, "ms", 1e3))
    alone = [units(RunOptions(), LocalOrchestrator(4)) for _ in range(given.rounds)]
    records.append(record("the same without Prefect", alone, "ms", 1e3))
    records.append(record("block on a worker, from submission to end", blocks, "s"))
    write(NAME, records, given.output)


if __name__ == "__main__":
    main()
