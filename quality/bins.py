"""Coarse states and actions that can be counted: unseen mass, SACo and the overlap between behaviours.

A state is binned by its share of the horizon (fifths), its validation accuracy (tenths) and the stages of its slots; an
action by op, slot and blueprint. The bins are the same for every dataset, so the counts can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import gammaln

from esper.leyline.actions import Op
from quality.coverage import decisions
from quality.measures import WHOLE, Measure

Ints = NDArray[np.int64]

_OP_CODE = "CASE op " + " ".join(f"WHEN '{op.name}' THEN {int(op)}" for op in Op) + " ELSE -1 END"
_STATE = (
    "least(floor(5 * step / horizon), 4)::BIGINT + 8 * least(floor(10 * coalesce(val_accuracy, 0)), 9)::BIGINT"
    " + 128 * stages::BIGINT"
)
_ACTION = f"({_OP_CODE}) * 64 + coalesce(action_slot, 0) * 8 + coalesce(action_blueprint, 0)"


def binned(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return how often each actor took each binned action in each binned state.

    Columns: environment, actor, uniform (drawn from u alone), state, action, n.
    """
    return (
        decisions(connection)
        .project(
            f"environment, actor, actor = 'random' AND epsilon = 1 AS uniform, {_STATE} AS state, {_ACTION} AS action"
        )
        .aggregate(
            "environment, actor, uniform, state, action, count(*) AS n",
            "environment, actor, uniform, state, action",
        )
        .to_arrow_table()
    )


def rarefied(counts: Ints, num: int) -> float:
    """Return how many distinct kinds `num` draws without replacement hold on average.

    Args:
        counts: How often each kind occurs, int64 [K].
        num: Draws, at most the sum of the counts.
    """
    total = int(counts.sum())
    if num >= total:
        return float(len(counts))
    left = total - counts
    possible = left >= num
    missed = np.zeros(len(counts))
    log_all = gammaln(total + 1) - gammaln(total - num + 1)
    missed[possible] = np.exp(gammaln(left[possible] + 1) - gammaln(left[possible] - num + 1) - log_all)
    return float(len(counts) - missed.sum())


def _kinds(table: Mapping[str, NDArray[np.generic]], of: NDArray[np.bool_]) -> Ints:
    """Return how often each (environment, state, action) occurs among some rows."""
    keys = np.stack([table["place"][of], table["state"][of], table["action"][of]])
    _, inverse = np.unique(keys, axis=1, return_inverse=True)
    return np.bincount(inverse.ravel(), weights=table["n"][of].astype(np.float64)).astype(np.int64)


def _arrays(table: pa.Table) -> dict[str, NDArray[np.generic]]:
    out = {name: np.asarray(table[name].to_numpy()) for name in ("state", "action", "n", "uniform")}
    for name in ("environment", "actor"):
        out[name] = np.asarray(table[name].to_numpy()).astype(str)
    out["place"] = np.unique(out["environment"], return_inverse=True)[1].ravel()
    return out


def _unseen(name: str, counts: Ints) -> Measure:
    single, total = int((counts == 1).sum()), int(counts.sum())
    message = f"Good-Turing: {single} of {len(counts)} binned (state, action) pairs occur once, {total} decisions"
    value = single / total if total else None
    return Measure(check="unseen_mass", environment=name, value=value, message=message)


def _saco(name: str, counts: Ints, uniform: Ints) -> Measure:
    num = int(min(counts.sum(), uniform.sum()))
    if not num:
        message = "no decision of the uniform policy u to compare with"
        return Measure(check="saco", environment=name, value=None, message=message)
    own, reference = rarefied(counts, num), rarefied(uniform, num)
    message = (
        f"distinct binned (state, action) pairs in {num} decisions: {own:.0f}, of the uniform policy {reference:.0f}"
    )
    return Measure(check="saco", environment=name, value=own / reference, message=message)


def _overlap(name: str, table: Mapping[str, NDArray[np.generic]], of: NDArray[np.bool_]) -> Measure:
    """The mean over behaviours of the overlap of its (state, action) distribution with that of the others."""
    actors = np.unique(table["actor"][of])
    if len(actors) < 2:
        return Measure(check="behaviour_overlap", environment=name, value=None, message="fewer than two behaviours")
    keys = np.stack([table["place"][of], table["state"][of], table["action"][of]])
    kinds, inverse = np.unique(keys, axis=1, return_inverse=True)
    index = np.searchsorted(actors, table["actor"][of])
    counts = np.zeros((len(actors), kinds.shape[1]))
    np.add.at(counts, (index, inverse.ravel()), table["n"][of].astype(np.float64))
    others = counts.sum(axis=0) - counts
    shares = counts / counts.sum(axis=1, keepdims=True)
    overlap = np.minimum(shares, others / others.sum(axis=1, keepdims=True)).sum(axis=1)
    worst = int(overlap.argmin())
    message = (
        f"share of a behaviour's binned (state, action) distribution that the others have too, mean of {len(actors)}; "
        f"least {actors[worst]} with {overlap[worst]:.2f}"
    )
    return Measure(check="behaviour_overlap", environment=name, value=float(overlap.mean()), message=message)


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `unseen_mass`, `saco` and `behaviour_overlap` of the whole dataset and of every environment."""
    table = _arrays(binned(connection))
    out = []
    for name in (WHOLE, *names):
        of = np.ones(len(table["n"]), dtype=bool) if name == WHOLE else table["environment"] == name
        counts = _kinds(table, of)
        out.append(_unseen(name, counts))
        out.append(_saco(name, counts, _kinds(table, of & table["uniform"].astype(bool))))
        out.append(_overlap(name, table, of))
    return out
