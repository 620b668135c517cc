"""From a sealed version to training tensors, against copying the same bytes in memory.

The version holds the episodes of a real cohort, many times under other ids. The first loading reads and checks the rows
and keeps the tensors beside the version; every later one maps them. A page counts as loaded when it has been touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import Record, compare, options, show, write
from benchmarks.plans import TINY, row_of_31
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.keys import derive_seed, hex_digest
from esper.simic.batches import Transitions, load_transitions
from esper.simic.load_tensors import FOLDER, load_tensors
from esper.tolaria.rollout import run_cohort

NAME = "load"

VIEW = "v4"

PAGE_BYTES = 4096


def seal(folder: Path, tables: Mapping[str, pa.Table], copies: int) -> Version:
    """Store the episodes of one cohort `copies` times, under environment seeds and ids of their own."""
    dataset = open_store(folder).dataset("benchmark")
    parts = [_renamed(tables, copy) for copy in range(copies)]
    dataset.commit({name: pa.concat_tables([part[name] for part in parts]) for name in tables})
    return dataset.seal(matrix_id="benchmark", provenance={})


def _renamed(tables: Mapping[str, pa.Table], copy: int) -> dict[str, pa.Table]:
    return {
        name: _with(
            table,
            episode_id=[hex_digest([old, copy], len(old)) for old in table["episode_id"].to_pylist()],
            env_seed=[derive_seed(old, copy) for old in table["env_seed"].to_pylist()],
        )
        for name, table in tables.items()
    }


def _with(table: pa.Table, **columns: Sequence[object]) -> pa.Table:
    changed = [pa.array(columns[f.name], f.type) if f.name in columns else table[f.name] for f in table.schema]
    return pa.table(changed, schema=table.schema)


def arrays(transitions: Transitions) -> list[np.ndarray]:
    """Return the arrays of transitions."""
    values = [getattr(transitions, name) for name in Transitions.__slots__]
    return [value for value in values if isinstance(value, np.ndarray)]


def touched(transitions: Transitions) -> int:
    """Read a byte of every page of every array, so that all of it is there."""
    return sum(int(array.reshape(-1).view(np.uint8)[::PAGE_BYTES].sum()) for array in arrays(transitions))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both ways of loading."""
    chosen = options(__doc__ or "", rounds=9, arguments=arguments)
    plan = row_of_31(**{**TINY, "batches_per_epoch": 1, **({} if chosen.quick else {"horizon": 20})})
    rewards = {plan.environment.name: plan.reward}
    with tempfile.TemporaryDirectory() as name:
        version = seal(Path(name), run_cohort(plan), 2 if chosen.quick else 64)
        loaded = load_transitions(version, VIEW, rewards)
        num_bytes = sum(array.nbytes for array in arrays(loaded))
        gigabytes = num_bytes / 1e9

        def copied() -> None:
            for array in arrays(loaded):
                array.copy()

        def first() -> None:
            for path in (version.root / FOLDER).glob("*"):
                path.unlink()
            load_tensors(version, VIEW, rewards)

        records: list[Record] = []
        ways = (("kept tensors", lambda: touched(load_tensors(version, VIEW, rewards))), ("rows, and kept", first))
        for case, way in ways:
            compared = compare(copied, way, chosen.rounds if case == "kept tensors" else min(3, chosen.rounds))
            record = compared.record(NAME, f"{len(loaded)} transitions, {case}", "CPU s", megabytes=num_bytes / 1e6)
            record["gigabytes_per_s"] = gigabytes / float(str(record["esper"]))
            record["memory_copy_gigabytes_per_s"] = gigabytes / float(str(record["reference"]))
            records.append(record)
            show(record)
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
