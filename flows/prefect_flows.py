"""The same flows under Prefect: a flow run per stage, a task run per cohort or training run.

Prefect schedules, shows and retries; what is done already is known to the store alone, so nothing is cached and no
result is pickled.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.context import RunOptions
from flows.orchestration import Orchestrator, Unit

T = TypeVar("T")
Request = TypeVar("Request", bound=RunOptions)


class PrefectOrchestrator:
    """Carries out units as task runs of the current flow run, stages as flow runs within it."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = max(1, concurrency)

    def units(self, units: Sequence[Unit[T]]) -> Iterator[tuple[int, T | Exception]]:
        """Yield (index, result or last error) as the units end."""
        submitted = {self._task(unit).submit(): index for index, unit in enumerate(units)}
        for future in as_completed(list(submitted)):
            outcome = future.result(raise_on_failure=False)
            yield submitted[future], outcome

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, as a flow run of that name."""

        def body() -> T:  # Prefect takes functions, not partials
            return work()

        return self.flow(name, body)()

    def flow(self, name: str, work: Callable[..., T]) -> Callable[..., T]:
        """Return a function as a Prefect flow whose tasks run on `concurrency` threads."""
        flow_run_name = f"{name}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
        runner = cast("TaskRunner[Any]", ThreadPoolTaskRunner(max_workers=self._concurrency))
        return Flow(
            work,
            name=name,
            flow_run_name=flow_run_name,
            task_runner=runner,
            persist_result=False,
            validate_parameters=False,
        )

    def _task(self, unit: Unit[T]) -> Task[[], T]:
        return Task(
            unit.work,
            name=unit.kind,
            task_run_name=unit.name,
            retries=unit.retries,
            cache_policy=NO_CACHE,
            persist_result=False,
        )


def run_as_flow(command: str, request: Request, core: Callable[[Request, Orchestrator], T]) -> T:
    """Run a flow function as a flow of the server that Prefect is set to use; the request is its parameter."""
    orchestrator = PrefectOrchestrator(request.workers)

    def body(request: RunOptions) -> T:
        return core(request, orchestrator)  # type: ignore[arg-type]

    return orchestrator.flow(command, body)(request=request)
