"""Is this version's data of the kind of the previous one's: shares of actions and distributions of key features."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper.leyline.actions import Op
from quality.arrays import Floats, numbers
from quality.coverage import DECISIONS
from quality.measures import Measure, rows

KEY_FEATURES = (
    *("train_loss", "val_loss", "val_accuracy", "plateau_epochs", "learning_rate", "seed_params", "host_params"),
    *("s0_seed_improvement", "s0_val_loss_drop", "s0_removal_cost", "s0_gradient_norm", "s0_weight_norm"),
)
"""What a policy's input rests on: the host's curve, its sizes, a seed's probes (slot 0 stands for all slots)."""

MAX_SAMPLED = 50_000
NUM_BINS = 10
FLOOR = 1e-4
"""An empty share is taken for this, as is usual: the logarithm of 0 would drown every other bin."""


def stability_index(shares: Floats, others: Floats) -> float:
    """Return the population stability index sum((p - q) log(p / q)) of two distributions over the same bins."""
    p, q = np.maximum(shares, FLOOR), np.maximum(others, FLOOR)
    return float(((p - q) * np.log(p / q)).sum())


def feature_index(values: Floats, before: Floats) -> float:
    """Return the index of a feature over the deciles that it had before, and a bin for unmeasured values."""
    known = before[np.isfinite(before)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, NUM_BINS + 1)[1:-1])) if len(known) else np.zeros(0)
    return stability_index(_shares(values, edges), _shares(before, edges))


def _shares(values: Floats, edges: Floats) -> Floats:
    index = np.where(np.isfinite(values), np.searchsorted(edges, np.nan_to_num(values), side="right"), len(edges) + 1)
    return np.asarray(np.bincount(index, minlength=len(edges) + 2) / max(len(values), 1))


def _sample(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return the key features of unforced decisions of role data, all or those whose key hashes lowest."""
    decided = connection.table("steps").filter(DECISIONS)
    total = int(decided.aggregate("count(*)").fetchall()[0][0])
    share = min(1.0, MAX_SAMPLED / max(total, 1))
    if share < 1:
        decided = decided.filter(f"hash(episode_id, step) < {int(share * 2**64)}::UBIGINT")
    return decided.project(", ".join(("environment", *KEY_FEATURES))).to_arrow_table()


def _op_shares(connection: duckdb.DuckDBPyConnection) -> dict[str, Floats]:
    counted = rows(connection.table("steps").filter(DECISIONS).aggregate("environment, op, count(*) AS n"))
    out: dict[str, Floats] = {}
    for row in counted:
        if row["op"] in Op.__members__:
            out.setdefault(row["environment"], np.zeros(len(Op)))[Op[row["op"]]] = row["n"]
    return {name: counts / counts.sum() for name, counts in out.items()}


def _of(table: pa.Table, places: NDArray[np.str_], name: str, column: str) -> Floats:
    return np.asarray(numbers(table, column)[places == name])


def _places(table: pa.Table) -> NDArray[np.str_]:
    return np.asarray(table["environment"].to_numpy().astype(str))


def measure(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str], previous: duckdb.DuckDBPyConnection | None
) -> list[Measure]:
    """Return `feature_drift` and `action_drift` of every environment against the previous sealed version.

    Args:
        connection: The version's.
        names: The environments.
        previous: A connection to the previous version; None where there is none, or it cannot be read.
    """
    if previous is None:
        none = "no earlier sealed version to compare with"
        checks = ("feature_drift", "action_drift")
        return [Measure(check=check, environment=name, value=None, message=none) for check in checks for name in names]
    now, before = _sample(connection), _sample(previous)
    places, others = _places(now), _places(before)
    actions, actions_before = _op_shares(connection), _op_shares(previous)
    out = []
    for name in names:
        if name not in actions or name not in actions_before:
            new = "the earlier version has no decisions of this environment"
            out += [
                Measure(check=check, environment=name, value=None, message=new)
                for check in ("feature_drift", "action_drift")
            ]
            continue
        index = {
            column: feature_index(_of(now, places, name, column), _of(before, others, name, column))
            for column in KEY_FEATURES
        }
        told = ", ".join(f"{column} {value:.3f}" for column, value in sorted(index.items(), key=lambda i: -i[1])[:3])
        message = f"greatest population stability index of {len(index)} key features: {told}"
        out.append(Measure(check="feature_drift", environment=name, value=max(index.values()), message=message))
        told = ", ".join(f"{op.name} {actions_before[name][op]:.1%} -> {actions[name][op]:.1%}" for op in Op)
        value = stability_index(actions[name], actions_before[name])
        message = f"population stability index of the ops: {told}"
        out.append(Measure(check="action_drift", environment=name, value=value, message=message))
    return out
