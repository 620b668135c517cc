"""Measuring two ways of doing the same work, in turn; one record per case.

A round runs the reference, then Esper. The ratio of a case is the median over rounds of (reference time / Esper time):
above 1, Esper is faster. Its spread is the interquartile range of the same ratios. A load that comes and goes on the
machine disturbs both halves of a round alike; CPU time is told apart from wall time because only one of them counts it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any numerical library is loaded
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

RESULTS = Path(__file__).resolve().parent / "results"

Clock = Literal["cpu", "wall"]

Record = dict[str, object]
"""`name`, `case`, `ratio`, `n`, `spread`, `unit`, `machine` and what else a benchmark adds."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a piece of work took: CPU seconds of this process, and wall seconds."""

    cpu: float
    wall: float

    def of(self, clock: Clock) -> float:
        """Return the seconds of one clock."""
        return self.cpu if clock == "cpu" else self.wall

    def part(self, count: float) -> Seconds:
        """Return the share of one of `count` equal pieces of the work."""
        return Seconds(self.cpu / count, self.wall / count)


def started() -> Seconds:
    """Return the clocks as they stand."""
    return Seconds(time.process_time(), time.perf_counter())


def since(start: Seconds) -> Seconds:
    """Return what has passed on both clocks."""
    return Seconds(time.process_time() - start.cpu, time.perf_counter() - start.wall)


def timed(work: Callable[[], object]) -> Seconds:
    """Run a piece of work and return what it took."""
    start = started()
    work()
    return since(start)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rounds of the reference and of Esper, paired."""

    reference: tuple[Seconds, ...]
    esper: tuple[Seconds, ...]

    def ratios(self, clock: Clock) -> list[float]:
        """Return reference / Esper of every round."""
        return [theirs.of(clock) / ours.of(clock) for theirs, ours in zip(self.reference, self.esper, strict=True)]

    def record(
        self, name: str, case: str, unit: str, *, clock: Clock = "cpu", per: float = 1.0, **more: object
    ) -> Record:
        """Return the record of a case.

        Args:
            name: Of the benchmark.
            case: What was measured.
            unit: Of `reference` and `esper`, such as "CPU ms per step".
            clock: Which time the ratio is of; the other one's ratio is `ratio_cpu` or `ratio_wall`.
            per: What a round's seconds are multiplied by to be in `unit`.
            more: Further fields.
        """
        other: Clock = "wall" if clock == "cpu" else "cpu"
        return {
            **summary(name, case, self.ratios(clock), unit),
            "clock": clock,
            "reference": per * statistics.median(seconds.of(clock) for seconds in self.reference),
            "esper": per * statistics.median(seconds.of(clock) for seconds in self.esper),
            f"ratio_{other}": statistics.median(self.ratios(other)),
            **more,
        }


def compare(reference: Callable[[], object], esper: Callable[[], object], rounds: int, warm_up: int = 1) -> Comparison:
    """Run both in turn, first unmeasured, and return their times by round.

    Args:
        reference: The plain way.
        esper: Esper's, the same amount of the same work.
        rounds: Measured rounds.
        warm_up: Unmeasured rounds before them.
    """
    for _ in range(warm_up):
        reference()
        esper()
    pairs = [(timed(reference), timed(esper)) for _ in range(rounds)]
    return Comparison(tuple(first for first, _ in pairs), tuple(second for _, second in pairs))


def summary(name: str, case: str, ratios: Sequence[float], unit: str, **more: object) -> Record:
    """Return a record: the median of the ratios, the interquartile range, how many, where and when."""
    return {
        "name": name,
        "case": case,
        "ratio": statistics.median(ratios),
        "n": len(ratios),
        "spread": interquartile_range(ratios),
        "unit": unit,
        "machine": machine(),
        **more,
    }


def interquartile_range(values: Sequence[float]) -> float:
    """Return the third quartile minus the first; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def machine() -> dict[str, object]:
    """Return what the figures depend on beside the code."""
    import torch

    facts: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line of every benchmark takes.

    Attributes:
        rounds: Measured rounds of every case.
        quick: Smallest sizes: whether it runs, not what it measures.
        output: Folder of the records.
    """

    rounds: int
    quick: bool
    output: Path


def options(description: str, rounds: int, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line, and set the process up as a cohort's: one torch thread, freed memory kept.

    That holds for the reference too, which runs in the same process.

    Args:
        description: What the benchmark measures.
        rounds: Rounds where the command line names none; `--quick` makes it 1.
        arguments: Instead of the process's own.
    """
    from esper.tolaria.runtime import keep_freed_memory, single_thread

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help=f"measured rounds of every case (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether it runs, not what it measures")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    given = parser.parse_args(arguments)
    single_thread()
    keep_freed_memory()
    chosen = given.rounds if given.rounds is not None else (1 if given.quick else rounds)
    if chosen < 1:
        parser.error(f"--rounds {chosen}: expected 1 or more")
    return Options(chosen, given.quick, given.output)


def write(name: str, records: Sequence[Record], output: Path = RESULTS) -> Path:
    """Write records as a JSON list to `output`/NAME.json, whole or not at all; return the path."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def show(record: Mapping[str, object]) -> None:
    """Print a record on one line."""
    line = f"{record['name']:<8} {record['case']:<44} ratio {record['ratio']:7.3f} +- {record['spread']:.3f}"
    line += f"  n {record['n']}"
    if "reference" in record and "esper" in record:
        line += f"  {record['reference']:.4g} -> {record['esper']:.4g} {record['unit']}"
    print(line, flush=True)
