"""Training on more data than may be in memory: the states on disk, against all of them in memory.

A version of about 2 GB of tensors is made of a real cohort's episodes, many times under other ids. Behaviour cloning
and implicit Q-learning train on it in a process each, in turn with a memory budget above its size and with one of
nothing. A run is a whole call of `train` on kept tensors: loading, normalisation, gradient steps, held-out losses and
checkpoint. `ratio` is the speed from disk over the speed in memory; `peak_mb` and `peak_in_memory_mb` are the largest
resident memory of the process, interpreter and libraries included. One more run makes the tensors from the rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from benchmarks.common import Comparison, Record, Seconds, options, show, since, started, write
from benchmarks.plans import TINY, row_of_31
from esper.karn.store import open_store
from esper.leyline.keys import derive_seed, hex_digest
from esper.tolaria.rollout import run_cohort

NAME = "larger-than-memory"
DATASET = "benchmark"
VIEW_BYTES = 564 * 4 + 185
"""Bytes of a state of view v4 and its mask."""
COPIES_PER_COMMIT = 16
STEPS = {"bc": {"steps": 1000, "log_every": 500}, "iql": {"value_steps": 500, "steps": 500, "log_every": 500}}
QUICK = {"bc": {"steps": 4, "log_every": 2}, "iql": {"value_steps": 2, "steps": 2, "log_every": 2}}
BUDGETS_MB = {"in memory": 1_000_000, "from disk": 0}


def make_version(folder: Path, num_bytes: int, horizon: int) -> int:
    """Store and seal a version whose tensors have about `num_bytes`; return its decisions."""
    plan = row_of_31(**{**TINY, "batches_per_epoch": 1, "horizon": horizon})
    tables = run_cohort(plan)
    dataset = open_store(folder).dataset(DATASET)
    copies = max(8, round(num_bytes / (VIEW_BYTES * len(tables["steps"]))))
    seeds = sorted(derive_seed("copy", copy) for copy in range(copies))  # as of cohorts: a file has few of them
    for first in range(0, copies, COPIES_PER_COMMIT):
        parts = [_renamed(tables, seed) for seed in seeds[first : first + COPIES_PER_COMMIT]]
        dataset.commit({name: pa.concat_tables([part[name] for part in parts]) for name in tables})
    rewards = {plan.environment.name: plan.reward.model_dump(mode="json")}
    dataset.seal(matrix_id="benchmark", provenance={"rewards": rewards})
    return copies * (len(tables["steps"]) - len(tables["episodes"]))


def _renamed(tables: Mapping[str, pa.Table], seed: int) -> dict[str, pa.Table]:
    """The tables under another environment seed, with episode ids of their own."""
    ids = {old: hex_digest([old, seed], len(old)) for old in tables["episodes"]["episode_id"].to_pylist()}
    return {
        name: _with(
            table,
            episode_id=[ids[old] for old in table["episode_id"].to_pylist()],
            env_seed=[seed] * len(table),
        )
        for name, table in tables.items()
    }


def _with(table: pa.Table, **columns: Sequence[object]) -> pa.Table:
    changed = [pa.array(columns[f.name], f.type) if f.name in columns else table[f.name] for f in table.schema]
    return pa.table(changed, schema=table.schema)


def train_here(folder: Path, algorithm: str, changes: Mapping[str, object]) -> dict[str, object]:
    """Train in this process; return seconds, the peak of its resident memory in MB, and the policy's digest."""
    import torch

    from esper.leyline.rewards import RewardSpec
    from esper.simic.training import load_recipe, train

    version = open_store(folder).resolve(DATASET)
    rewards = {key: RewardSpec.model_validate(spec) for key, spec in version.manifest.provenance["rewards"].items()}
    torch.optim.Adam([torch.zeros(1)])  # the first optimiser of a process imports what takes seconds
    with tempfile.TemporaryDirectory() as out:
        begin = started()
        policy = train(
            algorithm,
            version,
            rewards=rewards,
            out=Path(out) / "policy",
            seed=0,
            recipe=load_recipe(algorithm, changes=changes),
            override_health="a benchmark: copies of one cohort",
            on_log=lambda _: None,
        )
        took = since(begin)
    return {"cpu": took.cpu, "wall": took.wall, "peak_mb": peak_mb(), "digest": policy.digest}


def peak_mb() -> float:
    """Return the largest resident memory that this process had; `ru_maxrss` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e6


def train_apart(folder: Path, algorithm: str, budget_mb: int, quick: bool) -> dict[str, object]:
    """Train in a process of its own."""
    changes = (QUICK if quick else STEPS)[algorithm]
    command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--child", str(folder), algorithm]
    found = subprocess.run(
        [*command, json.dumps(changes)],
        env={**os.environ, "ESPER_MEMORY_MB": str(budget_mb)},
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return result


def kept(folder: Path) -> list[Path]:
    """Return the files of kept tensors."""
    return sorted(folder.glob("**/tensors/*.safetensors"))


def measure(folder: Path, algorithm: str, rounds: int, quick: bool) -> Record:
    """Return the record of one learner."""
    for path in kept(folder):
        path.unlink()
    made = train_apart(folder, algorithm, BUDGETS_MB["from disk"], quick)
    runs = {way: [] for way in BUDGETS_MB}
    for _ in range(rounds):
        for way, budget_mb in BUDGETS_MB.items():
            runs[way].append(train_apart(folder, algorithm, budget_mb, quick))
    digests = {run["digest"] for run in [made, *runs["in memory"], *runs["from disk"]]}
    if len(digests) != 1:
        raise SystemExit(f"{algorithm}: {len(digests)} different policies; expected the same from disk and in memory")
    pairs = {way: tuple(Seconds(run["cpu"], run["wall"]) for run in found) for way, found in runs.items()}
    compared = Comparison(pairs["in memory"], pairs["from disk"])
    peaks = {way: [run["peak_mb"] for run in found] for way, found in runs.items()}
    steps = sum(value for name, value in (QUICK if quick else STEPS)[algorithm].items() if name != "log_every")
    record = compared.record(NAME, algorithm, "s", clock="wall", steps=steps)
    return record | {
        "steps_per_s_in_memory": steps / statistics.median(run.wall for run in pairs["in memory"]),
        "steps_per_s": steps / statistics.median(run.wall for run in pairs["from disk"]),
        "peak_in_memory_mb": max(peaks["in memory"]),
        "peak_mb": max(peaks["from disk"]),
        "peak_making_the_file_mb": made["peak_mb"],
        "making_the_file_s": float(str(made["wall"])) - statistics.median(run.wall for run in pairs["from disk"]),
        "tensor_bytes": sum(path.stat().st_size for path in kept(folder)),
        "same_policy": True,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both learners."""
    chosen = options(__doc__ or "", rounds=5, arguments=arguments)
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_version(folder, 0 if chosen.quick else 2_000_000_000, 4 if chosen.quick else 20)
        for algorithm in ["bc"] if chosen.quick else STEPS:
            record = measure(folder, algorithm, chosen.rounds, chosen.quick) | {"decisions": rows}
            records.append(record)
            show(record)
            print(f"  peak {record['peak_mb']:.0f} MB from disk, {record['peak_in_memory_mb']:.0f} MB in memory")
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(train_here(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))))
    else:
        main()
