"""How the units of a flow are carried out: here in process, in `flows.prefect_flows` as Prefect tasks.

A unit is a cohort or a training run: seconds to minutes of work that a worker process does while its thread waits.
This module never imports Prefect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unit(Generic[T]):
    """One piece of work: `kind` names the task, `name` the run of it.

    It is tried 1 + `retries` times, no further once `again` says of an error that trying again is of no use.
    """

    kind: str
    name: str
    work: Callable[[], T]
    retries: int = 0
    again: Callable[[Exception], bool] = lambda error: True


class Orchestrator(Protocol):
    """Carries out units and stages."""

    def units(self, units: Sequence[Unit[T]]) -> Iterator[tuple[int, T | Exception]]:
        """Yield (index, result or last error) as the units end."""
        ...

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """Return what `work` returns; under Prefect it is a flow run of that name."""
        ...


def under_prefect(orchestrator: Orchestrator) -> bool:
    """Whether there is a flow run on whose page something can be shown."""
    return not isinstance(orchestrator, LocalOrchestrator)


class LocalOrchestrator:
    """Carries out units on threads of this process, at most `concurrency` at once."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = max(1, concurrency)

    def units(self, units: Sequence[Unit[T]]) -> Iterator[tuple[int, T | Exception]]:
        """Yield (index, result or last error) as the units end."""
        executor = ThreadPoolExecutor(self._concurrency, thread_name_prefix="esper-unit")
        try:
            started = {executor.submit(_attempts, unit): index for index, unit in enumerate(units)}
            for future in as_completed(started):
                yield started[future], future.result()
        finally:
            # No wait: after Ctrl-C the threads end when the workers that they wait for are killed.
            executor.shutdown(wait=False, cancel_futures=True)

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """Return what `work` returns."""
        return work()


def _attempts(unit: Unit[T]) -> T | Exception:
    outcome: T | Exception | None = None
    for _ in range(1 + unit.retries):
        try:
            return unit.work()
        except Exception as error:  # a unit's failure is a result that its flow decides about
            outcome = error
            if not unit.again(error):
                break
    return outcome  # type: ignore[return-value]


def results(orchestrator: Orchestrator, units: Sequence[Unit[T]]) -> list[T]:
    """Return the results in unit order; the first error is raised once all have ended."""
    collected: dict[int, T] = {}
    errors: list[Exception] = []
    for index, outcome in orchestrator.units(units):
        if isinstance(outcome, Exception):
            errors.append(outcome)
        else:
            collected[index] = outcome
    if errors:
        raise errors[0]
    return [collected[index] for index in range(len(units))]
