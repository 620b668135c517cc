"""The store on disk (the reference) and on a local S3 server: commit, seal and verify a cohort, wall time.

The server is moto's, in a process of its own on this machine: what is measured is Esper's, Delta Lake's and the
protocol's work without a network's delay; each request to a real object store adds a few to tens of milliseconds.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Record, compare, options, show, write
from esper.karn.store import Dataset, Store, Version, open_store

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / part) for part in (".", "karn")]

from factories import Tables, synthetic_tables  # noqa: E402
from s3_server import BUCKET, environment_of, s3_server  # noqa: E402

NAME = "store"
EPSILONS = tuple(index / 64 for index in range(63))
"""With `random` beside them, 64 episodes of an environment seed."""

_NUMBERS = itertools.count()


def cohort(first: int, num_env_seeds: int, horizon: int) -> Tables:
    """Return episodes of environment seeds of their own, 64 of each."""
    behaviours = ("baseline", "random")
    return synthetic_tables(
        num_env_seeds=num_env_seeds, first_replicate=first, horizon=horizon, epsilons=EPSILONS, behaviours=behaviours
    )


def prepared(store: Store, tables: Sequence[Tables], count: int) -> list[Dataset]:
    """Return new datasets, each of which holds the tables."""
    datasets = [store.dataset(f"d{next(_NUMBERS)}") for _ in range(count)]
    for dataset in datasets:
        for part in tables:
            dataset.commit(part)
    return datasets


def seal(dataset: Dataset) -> Version:
    """Seal what a dataset holds."""
    return dataset.seal(matrix_id="benchmark", provenance={})


def in_turn(work: Callable[[Dataset], object], datasets: Sequence[Dataset]) -> Callable[[], object]:
    """Return what does the work on one of the datasets after the other, a dataset a call."""
    left = iter(datasets)
    return lambda: work(next(left))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each operation in both places, in turn."""
    chosen = options(__doc__ or "", rounds=7, arguments=arguments)
    horizon, num_env_seeds = (3, 1) if chosen.quick else (25, 2)
    first, second = (cohort(replicate, num_env_seeds, horizon) for replicate in (0, num_env_seeds))
    shape = f"{len(first['episodes'])} x {horizon}"
    works: dict[str, tuple[list[Tables], Callable[[Dataset], object]]] = {
        "first commit": ([], lambda dataset: dataset.commit(first)),
        "later commit": ([first], lambda dataset: dataset.commit(second)),
        "seal": ([first], seal),
        "verify": ([first], lambda dataset: dataset.versions()[-1].verify()),
    }
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder, s3_server() as endpoint:
        os.environ.update(environment_of(endpoint, Path(folder) / "cache"))
        stores = (open_store(Path(folder) / "store"), open_store(f"s3://{BUCKET}/store"))
        for case, (before, work) in works.items():
            local, remote = (prepared(store, before, chosen.rounds + 1) for store in stores)
            if case == "verify":
                for dataset in (*local, *remote):
                    seal(dataset)
            compared = compare(in_turn(work, local), in_turn(work, remote), chosen.rounds)
            records.append(compared.record(NAME, f"{case}, {shape}", "wall s", clock="wall"))
            show(records[-1])
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
