"""What a dataset holds now of some episodes, sealed or not: studies read what an earlier, interrupted run stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from esper.karn import delta
from esper.karn.store import Dataset
from esper.karn.tables import attempt_keys, last_attempts
from esper.simic.poc import StoredEpisode

_KEY = ["episode_id", "attempt", "commit_id"]
_EPISODE = [
    *_KEY,
    "outcome",
    "final_test_accuracy",
    "control_final_test_accuracy",
    "host_params",
    "final_seed_params",
    "num_fossils",
    "train_flops",
]


def stored_episodes(dataset: Dataset, ids: Collection[str]) -> dict[str, StoredEpisode]:
    """Return what is stored of the episodes by id; those that are not stored, or failed, are left out."""
    rows = last_attempts(delta.read_current(dataset.place.child("episodes"), "episodes", _EPISODE))
    rows = rows.filter(pc.is_in(rows["episode_id"], pa.array(sorted(ids), pa.string())))
    rows = rows.filter(pc.not_equal(rows["outcome"], "failed"))
    seconds = _cpu_seconds(dataset)
    return {
        row["episode_id"]: StoredEpisode(
            outcome=row["outcome"],
            test_accuracy=row["final_test_accuracy"],
            control_test_accuracy=row["control_final_test_accuracy"],
            params=row["host_params"] + row["final_seed_params"],
            num_fossils=row["num_fossils"],
            train_flops=row["train_flops"],
            cpu_s=seconds[key],
        )
        for key, row in zip(attempt_keys(rows).to_pylist(), rows.to_pylist())
    }


def stored_steps(dataset: Dataset, ids: Collection[str], columns: Sequence[str]) -> pa.Table:
    """Return columns of the observations of the episodes' last attempts, with `episode_id` and `step`."""
    episodes = last_attempts(delta.read_current(dataset.place.child("episodes"), "episodes", _KEY))
    episodes = episodes.filter(pc.is_in(episodes["episode_id"], pa.array(sorted(ids), pa.string())))
    steps = delta.read_current(dataset.place.child("steps"), "steps", [*_KEY, "step", *columns])
    kept = steps.filter(pc.is_in(attempt_keys(steps), attempt_keys(episodes)))
    return kept.drop_columns(["attempt", "commit_id"])


def _cpu_seconds(dataset: Dataset) -> dict[str, float]:
    """CPU seconds of each attempt of each episode, as if it had run alone."""
    costs = delta.read_current(dataset.place.child("costs"), "costs", [*_KEY, "cpu_s_alone"])
    keyed = pa.table({"key": attempt_keys(costs), "cpu_s": costs["cpu_s_alone"]})
    sums = keyed.group_by("key", use_threads=False).aggregate([("cpu_s", "sum")])
    return dict(zip(sums["key"].to_pylist(), sums["cpu_s_sum"].to_pylist(), strict=True))
