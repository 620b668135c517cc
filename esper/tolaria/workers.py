"""Worker processes for cohorts and training runs: one torch thread each, results independent of their number.

A worker that dies costs the job it was running and nothing else: each worker has a pipe of its own, so a death is
attributed exactly, and the next job gets a fresh process. Workers end with their parent, even after `kill -9`.

Each worker fills a slot: a device that it computes on. Several slots may name the same GPU, which is how it is kept
busy: one small host alone leaves most of it idle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from types import TracebackType
from typing import Any, Self, TypeVar

import pyarrow as pa

from esper.leyline.errors import EsperError, SpecError
from esper.leyline.matrix import CohortPlan

Tables = dict[str, pa.Table]
"""`steps`, `costs` and `episodes` of one cohort, without the columns of the commit."""

Runner = Callable[[Sequence[CohortPlan]], list[Tables]]
"""Carries out plans and returns their tables in plan order."""

Engine = Callable[[CohortPlan], Tables]

T = TypeVar("T")

CPU_SLOT = "cpu"

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""What a process must find in its environment before it loads a numerical library."""


class WorkerError(EsperError):
    """A job failed in its worker process, or the process died under it."""


def check_device_names(devices: Sequence[str]) -> None:
    """Raise SpecError unless every slot is `cpu` or `cuda:N`, here or elsewhere, and all are of one kind."""
    for name in devices:
        if not re.fullmatch(r"cpu|cuda:\d+", name):
            raise SpecError(
                f"unknown device {name!r}\n  expected: cpu, or cuda:N with the number of a GPU, as in cuda:0"
            )
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise SpecError(
            f"devices {' '.join(devices)} are of two kinds\n"
            "  expected: all cpu or all cuda; an environment's numerics belong to one of them"
        )


def check_devices(devices: Sequence[str]) -> None:
    """Raise SpecError unless every slot is `cpu` or a GPU of this machine (`cuda:N`), and all are of one kind.

    Starts nothing on a GPU.
    """
    check_device_names(devices)
    gpus = sorted({name for name in devices if name != CPU_SLOT})
    if gpus:
        import torch

        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        absent = [name for name in gpus if name not in found]
        if absent:
            raise SpecError(
                f"no {', '.join(absent)} on this machine\n  found: {', '.join(found) or 'no GPU that torch can use'}\n"
                "  name one that is there, or run on the CPU: --devices cpu cpu"
            )


def cohort_engine(plan: CohortPlan) -> Tables:
    """Run one cohort with the real engine, imported here so that the parent process never loads torch for it."""
    from esper.tolaria.rollout import run_cohort

    return run_cohort(plan)


def encode_tables(tables: Mapping[str, pa.Table]) -> dict[str, bytes]:
    """Return the tables as Arrow IPC streams."""
    encoded = {}
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        encoded[name] = sink.getvalue().to_pybytes()
    return encoded


def decode_tables(encoded: Mapping[str, bytes]) -> Tables:
    """Return the tables of Arrow IPC streams."""
    return {name: pa.ipc.open_stream(data).read_all() for name, data in encoded.items()}


def _run_encoded(engine: Engine, plan_json: str) -> dict[str, bytes]:
    return encode_tables(engine(CohortPlan.model_validate_json(plan_json)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _portable(error: Exception) -> EsperError:
    """The error as it crosses the pipe: our own as they are, others by name (they may not pickle), with a trace."""
    if isinstance(error, EsperError):
        return error
    portable = WorkerError(f"{type(error).__name__}: {error}")
    portable.add_note("".join(traceback.format_exception(error)))
    return portable


def _serve(connection: Connection, device: str) -> None:
    """The life of a worker: take its slot, then answer jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_torch_threads()
    _take_slot(device)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (True, function(*arguments))
        except Exception as error:  # any failure of a job is an answer, not the worker's end
            answer = (False, _portable(error))
        connection.send(answer)


def _limit_torch_threads() -> None:
    from esper.tolaria.runtime import single_thread

    single_thread()


def _take_slot(device: str) -> None:
    from esper.tolaria.runtime import use_device

    use_device(device)


@contextlib.contextmanager
def temporary_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within it, this process (and what it starts) has these environment variables."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


_SPAWNING = threading.Lock()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: SpawnContext, device: str) -> None:
        with _SPAWNING, temporary_environment(ONE_THREAD):
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, device), daemon=True)
            self._process.start()
            theirs.close()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Return the function's result; raise what it raised, or WorkerError where the process died."""
        try:
            self._connection.send((function, arguments))
            ok, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise WorkerDiedError(
                f"a worker process died (exit code {self._process.exitcode})\n"
                "  a negative code is the signal: -9 is a kill, often for lack of memory; try fewer --workers"
            ) from None
        if ok:
            return value
        raise value

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.join(timeout=5)


class WorkerDiedError(WorkerError):
    """The process is gone, killed or out of memory: its place needs a new one."""


@dataclass(slots=True)
class _Slot:
    """A place for one worker on a device; empty before its first job and after a death."""

    device: str
    worker: _Worker | None = None


class CohortPool:
    """Runs cohorts, and other jobs, on `num_workers` spawned processes; 0 runs them in this process.

    Use as a context manager: leaving it ends every worker at once, whatever is still running.

    Args:
        num_workers: Processes.
        engine: What runs a cohort.
        devices: The slot of each process, `cpu` or `cuda:N`; left out, all on the CPU.

    Raises:
        SpecError: Fewer than no workers, not one device for each, or a device that is not there.
    """

    def __init__(
        self, num_workers: int, *, engine: Engine = cohort_engine, devices: Sequence[str] | None = None
    ) -> None:
        if num_workers < 0:
            raise SpecError(f"{num_workers} workers\n  expected: 1 or more, or 0 to run in this process")
        if devices is not None and len(devices) != num_workers:
            raise SpecError(f"{num_workers} workers on {len(devices)} devices\n  expected: one device for each worker")
        check_devices(devices or ())
        self.num_workers = num_workers
        self._engine = engine
        self._context = multiprocessing.get_context("spawn")
        self._threads = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="esper-worker")
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        for device in devices or [CPU_SLOT] * num_workers:
            self._idle.put(_Slot(device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker; jobs that had not finished raise WorkerError, those not begun are cancelled."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Start a job: a module-level function and arguments that pickle."""
        return self._threads.submit(self._in_place if self.num_workers == 0 else self._on_worker, function, arguments)

    def submit(self, plan: CohortPlan) -> Future[Tables]:
        """Start a cohort."""
        return self._threads.submit(self._cohort, plan)

    def run(self, plans: Sequence[CohortPlan]) -> Iterator[tuple[int, Tables | Exception]]:
        """Yield (index of the plan, its tables or its error) as each ends."""
        started = {self.submit(plan): index for index, plan in enumerate(plans)}
        for future in as_completed(started):
            error = future.exception()
            if error is None:
                yield started[future], future.result()
            elif isinstance(error, Exception):
                yield started[future], error
            else:
                raise error

    def run_all(self, plans: Sequence[CohortPlan]) -> list[Tables]:
        """Return the tables in plan order (a `Runner`); the first error is raised."""
        futures = [self.submit(plan) for plan in plans]
        return [future.result() for future in futures]

    def _cohort(self, plan: CohortPlan) -> Tables:
        arguments = (self._engine, plan.model_dump_json())
        run = self._in_place if self.num_workers == 0 else self._on_worker
        return decode_tables(run(_run_encoded, arguments))

    def _in_place(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        _limit_torch_threads()
        try:
            return function(*arguments)
        except Exception as error:
            raise _portable(error) from error

    def _on_worker(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        slot = self._idle.get()
        try:
            worker = slot.worker = slot.worker or self._start(slot.device)
            result: T = worker.call(function, arguments)
        except WorkerDiedError:
            with self._lock:
                self._workers.discard(worker)
            slot.worker = None
            raise
        finally:
            self._idle.put(slot)
        return result

    def _start(self, device: str) -> _Worker:
        worker = None if self._closed else _Worker(self._context, device)
        with self._lock:
            closed = self._closed
            if worker is not None and not closed:
                self._workers.add(worker)
                return worker
        if worker is not None:
            worker.kill()
        raise WorkerError("the workers were shut down before this job began")
