"""State clusters: alike states by k-means on the standardised view v4, and how many actions each holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from esper.leyline.actions import NUM_OPS
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.views import V4
from quality.arrays import numbers, ops
from quality.coverage import DECISIONS
from quality.measures import WHOLE, Measure

MAX_FITTED_ROWS = 20_000
"""The centres of 100 clusters are as good from 20,000 rows as from a million; a fit on all would take minutes."""

MAX_ASSIGNED_ROWS = 100_000
"""Rows put into clusters, 1,000 to a cluster: an action that all of them lack is rarer than one in 300 (95 %)."""

ROWS_PER_CLUSTER = 50
MAX_CLUSTERS = 100
BATCH_ROWS = 32_768

Matrix = NDArray[np.float32]
Ints = NDArray[np.int64]


def encode(table: pa.Table) -> Matrix:
    """Return the view v4 of rows that have `step` and the feature columns, float32 [N, width]."""
    return V4.encode(
        {name: numbers(table, name).astype(np.float32) for name in FEATURE_COLUMNS},
        numbers(table, "step").astype(np.int64),
    )


def _batches(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """Yield the decisions to assign: all of them, or those whose key hashes lowest, the same ones every time."""
    draw = "hash(episode_id, step)"
    share = min(1.0, MAX_ASSIGNED_ROWS / max(_count(connection), 1))
    decided = connection.table("health_rows").filter(DECISIONS)
    if share < 1:
        decided = decided.filter(f"{draw} < {int(share * 2**64)}::UBIGINT")
    columns = ", ".join(("environment", "step", "op", "action_slot", "action_blueprint", *FEATURE_COLUMNS))
    for batch in decided.project(f"{columns}, {draw} AS draw").to_arrow_reader(BATCH_ROWS):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _count(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.table("health_core").filter(DECISIONS).aggregate("count(*)").fetchall()[0]
    return int(row[0])


def cluster_states(encoded: Matrix, fitted_N: NDArray[np.bool_] | None = None) -> Ints:
    """Return the cluster of each row, int64 [N]: k-means on standardised rows, min(100, N / 50) clusters, fixed seed.

    Args:
        encoded: The view of each row, float32 [N, width].
        fitted_N: The rows that the centres are fitted on, bool [N]; all where None.
    """
    spread = encoded.std(axis=0, dtype=np.float64)
    varying = spread > 1e-6
    clusters = max(1, min(MAX_CLUSTERS, len(encoded) // ROWS_PER_CLUSTER))
    if clusters == 1 or not varying.any():
        return np.zeros(len(encoded), dtype=np.int64)
    standard = encoded[:, varying]
    standard -= standard.mean(axis=0, dtype=np.float64).astype(np.float32)
    standard /= spread[varying].astype(np.float32)
    means = KMeans(n_clusters=clusters, random_state=0, n_init=1, max_iter=30)
    with threadpool_limits(1):  # sums over threads are not reproducible
        means.fit(standard if fitted_N is None else standard[fitted_N])
        return np.asarray(means.predict(standard), dtype=np.int64)


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `single_action_clusters` and `actions_per_cluster` of the whole dataset and of every environment."""
    views: list[Matrix] = []
    environment_N, op_N, action_N, draw_N = (
        [np.zeros(0, dtype=object)],
        *([np.zeros(0, dtype=kind)] for kind in (np.int64, np.int64, np.uint64)),
    )
    for batch in _batches(connection):
        views.append(encode(batch))
        op = ops(batch)
        slot, blueprint = (numbers(batch, name).astype(np.int64) for name in ("action_slot", "action_blueprint"))
        environment_N.append(batch["environment"].to_numpy())
        op_N.append(op)
        action_N.append((op * 8 + slot) * 8 + blueprint)
        draw_N.append(batch["draw"].to_numpy())
    draws = np.concatenate(draw_N)
    order = np.argsort(draws, kind="stable")  # rows have no order of their own; k-means has
    encoded = np.concatenate(views)[order] if views else np.zeros((0, V4.width), dtype=np.float32)
    cluster_N = cluster_states(encoded, np.arange(len(encoded)) < MAX_FITTED_ROWS)
    environments, op_all, action_all = (np.concatenate(part)[order] for part in (environment_N, op_N, action_N))
    out = []
    for name in (WHOLE, *names):
        of = np.ones(len(op_all), dtype=bool) if name == WHOLE else environments == name
        out += _of_environment(name, cluster_N[of], op_all[of], action_all[of])
    return out


def _of_environment(name: str, cluster_N: Ints, op_N: Ints, action_N: Ints) -> list[Measure]:
    seen = np.zeros((int(cluster_N.max(initial=-1)) + 1, NUM_OPS), dtype=bool)
    seen[cluster_N, op_N] = True
    occupied = int(seen.any(axis=1).sum())
    single = int((seen.sum(axis=1) == 1).sum())
    message = f"{single} of {occupied} clusters of {len(op_N)} unforced states hold a single op"
    value = single / occupied if occupied else 1.0
    first = Measure(check="single_action_clusters", environment=name, value=value, message=message)
    pairs = np.unique(np.stack([cluster_N, action_N]), axis=1)
    counts = np.unique(pairs[0], return_counts=True)[1]
    mean = float(counts.mean()) if len(counts) else None
    message = "distinct (op, slot, blueprint) in a state cluster, on average"
    message += f"; {counts.min()} at least, {counts.max()} at most" if len(counts) else ""
    return [first, Measure(check="actions_per_cluster", environment=name, value=mean, message=message)]
