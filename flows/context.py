"""What a flow works with: the store, a run's folder, workers, progress and events."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import pyarrow as pa
from pydantic import Field, JsonValue, model_validator

from esper.karn.kinds import refuse_mixed_tables
from esper.karn.store import Dataset, Store, open_store
from esper.leyline.events import EventKind
from esper.leyline.spec_base import Spec
from esper.nissa.writer import EventWriter
from flows.orchestration import Orchestrator, Unit, results
from flows.progress import Reporter, reporter

if TYPE_CHECKING:
    from esper.leyline.matrix import CohortPlan
    from esper.tolaria.workers import CohortPool, Tables

NAME = r"^[a-z0-9-]{1,40}$"


class RunOptions(Spec):
    """What every flow is asked for.

    Attributes:
        store: A path, else $ESPER_STORE, else datasets/local.
        workers: Worker processes; 0 runs in this process. Left out, one, or as many as there are devices.
        devices: The slot of each worker, `cpu` or `cuda:N`; a device may be named more than once. Left out, the CPU.
        run_name: Name of the run's folder.
    """

    store: str | None = None
    workers: Annotated[int, Field(ge=0)] = 1
    devices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    run_name: Annotated[str, Field(pattern=NAME)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_worker_per_device(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("devices") and data.get("workers") is None:
            return {**data, "workers": len(data["devices"])}
        return data

    @model_validator(mode="after")
    def _as_many_workers_as_devices(self) -> Self:
        if self.devices is not None and len(self.devices) != self.workers:
            raise ValueError(
                f"{self.workers} workers on {len(self.devices)} devices; leave workers out, or name as many"
            )
        return self

    def check_devices(self) -> None:
        """Raise where a device is unknown or not on this machine; starts nothing on it."""
        if self.devices is not None:
            from esper.tolaria.workers import check_devices

            check_devices(self.devices)

    def check(self) -> None:
        """Raise where a name of the request is unknown; quick, writes nothing, done before anything is started."""


@dataclass(frozen=True)
class Context:
    """The surroundings of one run."""

    store: Store
    dataset: Dataset
    run: str
    folder: Path
    pool: CohortPool
    orchestrator: Orchestrator
    progress: Reporter
    events: EventWriter
    commits: threading.Lock = field(default_factory=threading.Lock)

    def run_plans(self, task: str, plans: Sequence[CohortPlan], *, counted: bool = False) -> list[Tables]:
        """Carry out cohorts as units, each tried twice; store each as it ends; return the tables in plan order.

        Args:
            task: What they are for; `counted` cohorts are its units of progress.
            plans: The cohorts.
            counted: Whether each counts.

        Raises:
            EsperError: A cohort failed twice; the others ended and are stored.
        """
        units = [
            Unit("cohort", f"{task}:{cohort_name(plan)}", partial(self._finish, task, plan, counted), retries=1)
            for plan in plans
        ]
        return results(self.orchestrator, units)

    def _finish(self, task: str, plan: CohortPlan, counted: bool) -> Tables:
        tables = self.pool.submit(plan).result()
        self.commit(tables)
        tell = self.progress.advance if counted else self.progress.note
        tell(task, cohort_name(plan))
        return tables

    def commit(self, tables: Mapping[str, pa.Table]) -> None:
        """Store the episodes that the dataset does not have yet; one commit at a time."""
        with self.commits:
            refuse_mixed_tables(self.dataset, tables)
            self.dataset.commit(tables)


def cohort_name(plan: CohortPlan) -> str:
    """Return the name of a cohort as people read it."""
    return f"{plan.environment.name}/{plan.replicate}"


def new_run_name(command: str) -> str:
    """Return a name from the command and the time (UTC)."""
    return f"{command}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"


@contextlib.contextmanager
def open_context(
    options: RunOptions, dataset: str, command: str, orchestrator: Orchestrator, *, events: dict[str, JsonValue]
) -> Iterator[Context]:
    """Yield the surroundings of a run of `command` on a dataset; leaving ends its workers and closes its files.

    The run's folder is STORE/DATASET/runs/RUN; `events` goes into its first event.
    """
    from esper.tolaria.workers import CohortPool

    store = open_store(options.store)
    held = store.dataset(dataset)
    run = options.run_name or new_run_name(command)
    folder = held.path / "runs" / run
    with (
        EventWriter(folder, run) as writer,
        CohortPool(options.workers, devices=options.devices) as pool,
        reporter() as progress,
    ):
        writer.emit(EventKind.RUN_STARTED, {"command": command, **events})
        outcome = "failed"
        try:
            yield Context(store, held, run, folder, pool, orchestrator, progress, writer)
            outcome = "completed"
        except KeyboardInterrupt:
            outcome = "interrupted"
            pool.close()  # threads that wait for a worker must not keep the flow from ending
            raise
        finally:
            writer.emit(EventKind.RUN_ENDED, {"outcome": outcome})
