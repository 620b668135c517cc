"""Is there something to compare: ops where they were valid, their entropy, several actions from alike states.

Decisions count where an offline learner reads them (role data), not forced, and not a replayed prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import entr
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from esper.leyline.actions import Op
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.views import V4
from quality.measures import WHOLE, Measure, rows
from quality.tree_audit import numbers, ops

MAX_CLUSTERED_ROWS = 20_000
ROWS_PER_CLUSTER = 50
MAX_CLUSTERS = 100

_DECISIONS = "NOT is_last AND NOT forced AND NOT replayed AND op IS NOT NULL AND role = 'data'"


def decisions(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the unforced decisions of role data, as a relation with every column of `steps`."""
    return connection.table("health_rows").filter(_DECISIONS)


def _possible(connection: duckdb.DuckDBPyConnection) -> dict[str, frozenset[Op]]:
    """Return by environment the ops that its options allow at all."""
    specs = rows(connection.sql("SELECT environment, min(environment_spec) AS spec FROM episodes GROUP BY environment"))
    out = {}
    for row in specs:
        spec = EnvironmentSpec.model_validate_json(row["spec"])
        out[row["environment"]] = frozenset(
            op
            for op in Op
            if op is Op.WAIT or (spec.seeds_cap > 0 and (op is not Op.FOSSILIZE or spec.fossils_cap > 0))
        )
    return out


def _op_counts(connection: duckdb.DuckDBPyConnection) -> dict[str, NDArray[np.int64]]:
    """Return by environment, and for the whole, int64 [2, 5]: how often each op was valid, and how often taken."""
    parts = [f"count(*) FILTER (valid_ops & {1 << op} > 0) AS valid_{int(op)}" for op in Op]
    parts += [f"count(*) FILTER (op = '{op.name}' AND valid_ops & {1 << op} > 0) AS taken_{int(op)}" for op in Op]
    out = {}
    for row in rows(decisions(connection).aggregate("environment, " + ", ".join(parts))):
        counts = [[row[f"{kind}_{int(op)}"] for op in Op] for kind in ("valid", "taken")]
        out[row["environment"]] = np.array(counts, dtype=np.int64)
    out[WHOLE] = sum(out.values(), np.zeros((2, len(Op)), dtype=np.int64))
    return out


def _ops(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    counts, possible = _op_counts(connection), _possible(connection)
    possible[WHOLE] = frozenset().union(*possible.values()) if possible else frozenset(Op)
    out = []
    for name in (WHOLE, *names):
        valid, taken = counts.get(name, np.zeros((2, len(Op)), dtype=np.int64))
        shares = {op: taken[op] / valid[op] if valid[op] else 0.0 for op in Op if op in possible[name]}
        told = ", ".join(f"{op.name} {share:.1%} of {valid[op]}" for op, share in shares.items())
        least = min(shares, key=lambda op: shares[op])
        out.append(
            Measure(
                check="action_coverage",
                environment=name,
                value=float(shares[least]),
                message=f"least is {least.name}; share of each op where it was valid: {told}",
            )
        )
        total = taken.sum()
        entropy = float(entr(taken / total).sum()) if total else 0.0
        message = f"of the op in {total} unforced decisions; at most {np.log(len(Op)):.2f}"
        out.append(Measure(check="action_entropy", environment=name, value=entropy, message=message))
    return out


def _sample(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return the decisions to cluster: all of them, or a fixed sample chosen by a hash of their key."""
    columns = ", ".join(("environment", "step", "op", *FEATURE_COLUMNS))
    relation = decisions(connection).project(f"{columns}, md5(concat(episode_id, '/', step)) AS draw")
    return relation.order("draw").limit(MAX_CLUSTERED_ROWS).to_arrow_table()


def cluster_states(table: pa.Table) -> NDArray[np.int64]:
    """Return the cluster of each row, int64 [N]: k-means on standardised v4, min(100, N / 50) clusters, fixed seed."""
    encoded = V4.encode(
        {name: numbers(table, name).astype(np.float32) for name in FEATURE_COLUMNS},
        numbers(table, "step").astype(np.int64),
    )
    spread = encoded.std(axis=0)
    varying = spread > 1e-6
    clusters = max(1, min(MAX_CLUSTERS, len(encoded) // ROWS_PER_CLUSTER))
    if clusters == 1 or not varying.any():
        return np.zeros(len(encoded), dtype=np.int64)
    standard = (encoded[:, varying] - encoded[:, varying].mean(axis=0)) / spread[varying]
    means = KMeans(n_clusters=clusters, random_state=0, n_init=1, max_iter=30)
    with threadpool_limits(1):  # sums over threads are not reproducible
        return np.asarray(means.fit_predict(standard), dtype=np.int64)


def _clusters(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    table = _sample(connection)
    cluster_N = cluster_states(table) if table.num_rows else np.zeros(0, dtype=np.int64)
    op_N, environment_N = ops(table), table["environment"].to_numpy()
    out = []
    for name in (WHOLE, *names):
        of = np.ones(len(op_N), dtype=bool) if name == WHOLE else environment_N == name
        seen = np.zeros((int(cluster_N.max(initial=-1)) + 1, len(Op)), dtype=bool)
        seen[cluster_N[of], op_N[of]] = True
        occupied = seen.any(axis=1)
        single = int((seen.sum(axis=1) == 1).sum())
        value = single / int(occupied.sum()) if occupied.any() else 1.0
        message = f"{single} of {occupied.sum()} clusters of {of.sum()} unforced states hold a single op"
        out.append(Measure(check="single_action_clusters", environment=name, value=value, message=message))
    return out


def _states(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    action = f"(op, {', '.join(ACTION_FIELDS)})"
    by_state = decisions(connection).aggregate(
        f"environment, state_id, count(DISTINCT {action}) AS actions", "environment, state_id"
    )
    counted = by_state.aggregate("environment, count(*) AS states, count(*) FILTER (actions > 1) AS compared")
    found = {row["environment"]: (row["compared"], row["states"]) for row in rows(counted)}
    found[WHOLE] = sum(v[0] for v in found.values()), sum(v[1] for v in found.values())
    out = []
    for name in (WHOLE, *names):
        compared, states = found.get(name, (0, 0))
        out.append(
            Measure(
                check="distinct_actions_per_state",
                environment=name,
                value=compared / states if states else None,
                message=f"{compared} of {states} distinct states hold at least two different actions",
            )
        )
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return the coverage checks of the whole dataset and of every environment."""
    return [*_ops(connection, names), *_clusters(connection, names), *_states(connection, names)]
