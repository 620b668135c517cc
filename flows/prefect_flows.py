"""The same flows under Prefect: a flow run per stage, a task run per cohort or training run.

Prefect schedules, shows and retries; what is done already is known to the store alone, so nothing is cached and no
result is pickled.
"""

from __future__ import annotations

import datetime
import queue
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, TypeVar, cast

from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.context import RunOptions
from flows.ending import listen_again
from flows.orchestration import Orchestrator, Unit
from flows.secrets import mask_logs, masked_errors

T = TypeVar("T")
Request = TypeVar("Request", bound=RunOptions)


class PrefectOrchestrator:
    """Carries out units as task runs of the current flow run, stages as flow runs within it."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = max(1, concurrency)

    def units(self, units: Sequence[Unit[T]]) -> Iterator[tuple[int, T | Exception]]:
        """Yield (index, result or last error) as the units end; at most `concurrency` of them have begun."""
        waiting = iter(enumerate(units))
        ended: queue.SimpleQueue[tuple[int, PrefectFuture[T]]] = queue.SimpleQueue()
        running = 0
        while True:
            while running < self._concurrency and (item := next(waiting, None)) is not None:
                index, unit = item
                self._task(unit).submit().add_done_callback(partial(_put, ended, index))
                running += 1
            if not running:
                return
            index, future = ended.get()
            running -= 1
            yield index, future.result(raise_on_failure=False)

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, as a flow run of that name."""

        def body() -> T:  # Prefect takes functions, not partials
            return work()

        return self.flow(name, body)()

    def flow(self, name: str, work: Callable[..., T]) -> Callable[..., T]:
        """Return a function as a Prefect flow whose tasks run on `concurrency` threads."""

        @wraps(work)
        def told(*arguments: Any, **named: Any) -> T:
            listen_again()  # the flow engine answers SIGTERM by itself, and waits for a server that may be gone
            with masked_errors():
                return work(*arguments, **named)

        flow_run_name = f"{name}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
        runner = cast("TaskRunner[Any]", ThreadPoolTaskRunner(max_workers=self._concurrency))
        return Flow(
            told,
            name=name,
            flow_run_name=flow_run_name,
            task_runner=runner,
            persist_result=False,
            validate_parameters=False,
        )

    def _task(self, unit: Unit[T]) -> Task[[], T]:
        def again(task: object, run: object, state: State[Any]) -> bool:
            return not isinstance(state.data, Exception) or unit.again(state.data)

        def work() -> T:
            with masked_errors():
                return unit.work()

        return Task(
            work,
            name=unit.kind,
            task_run_name=unit.name,
            retries=unit.retries,
            retry_condition_fn=again,
            cache_policy=NO_CACHE,
            persist_result=False,
        )


def _put(ended: queue.SimpleQueue[tuple[int, PrefectFuture[T]]], index: int, future: PrefectFuture[T]) -> None:
    ended.put((index, future))


def run_as_flow(command: str, request: Request, core: Callable[[Request, Orchestrator], T]) -> T:
    """Run a flow function as a flow of the server that Prefect is set to use; the request is its parameter."""
    mask_logs()
    orchestrator = PrefectOrchestrator(request.workers)

    def body(request: RunOptions) -> T:
        return core(request, orchestrator)  # type: ignore[arg-type]

    return orchestrator.flow(command, body)(request=request)
