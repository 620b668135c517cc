"""Is there something to compare: ops where they were valid, their entropy, several actions from one state.

Decisions count where an offline learner reads them (role data), not forced, and not a replayed prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from esper.leyline.actions import Op
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.specs import EnvironmentSpec
from quality.measures import WHOLE, Measure, rows

DECISIONS = "NOT is_last AND NOT forced AND NOT replayed AND op IS NOT NULL AND role = 'data'"
"""The SQL of the decisions that count."""


def decisions(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the unforced decisions of role data, as a relation with the columns of `health_core`."""
    return connection.table("health_core").filter(DECISIONS)


def environment_specs(connection: duckdb.DuckDBPyConnection) -> dict[str, EnvironmentSpec]:
    """Return the spec of each environment (of several under one name, the first)."""
    found = rows(connection.sql("SELECT environment, min(environment_spec) AS spec FROM episodes GROUP BY environment"))
    return {row["environment"]: EnvironmentSpec.model_validate_json(row["spec"]) for row in found}


def possible_ops(spec: EnvironmentSpec) -> frozenset[Op]:
    """Return the ops that an environment's options allow at all."""
    return frozenset(
        op for op in Op if op is Op.WAIT or (spec.seeds_cap > 0 and (op is not Op.FOSSILIZE or spec.fossils_cap > 0))
    )


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
    counts = _op_counts(connection)
    possible = {name: possible_ops(spec) for name, spec in environment_specs(connection).items()}
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


def _normalised(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """The entropy of the op given which ops were valid, over its greatest value there, averaged over decisions."""
    keys = "environment, valid_ops, op"
    counted = decisions(connection).aggregate(f"{keys}, count(*) AS n", keys).order(keys)
    choices: dict[str, dict[int, Counter[str]]] = {}
    for row in rows(counted):
        for name in (WHOLE, row["environment"]):
            choices.setdefault(name, {}).setdefault(row["valid_ops"], Counter())[row["op"]] += row["n"]
    out = []
    for name in (WHOLE, *names):
        total = entropy = 0.0
        for valid, by_op in choices.get(name, {}).items():
            counts, num = np.array(list(by_op.values())), by_op.total()
            total += num
            entropy += num * float(entr(counts / num).sum()) / np.log(max(valid.bit_count(), 2))
        value = entropy / total if total else None
        message = f"1 is uniform over the valid ops; {total:.0f} unforced decisions, {len(choices.get(name, {}))} sets"
        out.append(Measure(check="normalised_entropy", environment=name, value=value, message=message))
    return out


def _states(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    action = f"hash(op, {', '.join(ACTION_FIELDS)})"
    by_state = decisions(connection).aggregate(
        f"environment, state_hash, count(*) AS n, min({action}) <> max({action}) AS compared", "environment, state_hash"
    )
    counted = by_state.aggregate(
        "environment, count(*) AS states, count(*) FILTER (compared) AS compared, sum(n)::BIGINT AS n"
    )
    found = {row["environment"]: (row["compared"], row["states"], row["n"]) for row in rows(counted)}
    found[WHOLE] = tuple(sum(part) for part in zip(*found.values())) if found else (0, 0, 0)
    out = []
    for name in (WHOLE, *names):
        compared, states, num = found.get(name, (0, 0, 0))
        out.append(
            Measure(
                check="distinct_actions_per_state",
                environment=name,
                value=compared / states if states else None,
                message=f"{compared} of {states} distinct states ({num} decisions) hold at least two different actions",
            )
        )
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return the coverage checks of ops and states, of the whole dataset and of every environment."""
    return [*_ops(connection, names), *_normalised(connection, names), *_states(connection, names)]
