"""Who made the data: how many different behaviours, how many repeated histories, and were the propensities right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np

from quality.audit import RatioSums, TreeAudit
from quality.measures import WHOLE, Measure, rows
from quality.support import calibration, effective_sizes, ess_curves

_ROLE_DATA = "sound AND role = 'data' AND branch_parent IS NULL"

Signature = frozenset[tuple[str, int, str]]
"""What a behaviour did: (environment, env_seed, history) of its greediest episodes."""


def _signatures(connection: duckdb.DuckDBPyConnection) -> dict[str, Signature]:
    """Return what each behaviour did at its own lowest epsilon; every plan of an explorer is a behaviour of its own."""
    episodes = connection.table("health_episodes").filter(_ROLE_DATA)
    found = rows(
        episodes.project(
            "environment, env_seed, history_id, epsilon, "
            "concat(controller, CASE WHEN plan IS NULL THEN '' ELSE concat(' plan ', plan) END) AS behaviour, "
            "min(epsilon) OVER (PARTITION BY controller) AS lowest"
        ).filter("epsilon = lowest")
    )
    collected = defaultdict(set)
    for row in found:
        collected[row["behaviour"]].add((row["environment"], row["env_seed"], row["history_id"]))
    return {name: frozenset(histories) for name, histories in sorted(collected.items())}


def _groups(signatures: Mapping[str, Signature]) -> list[list[str]]:
    """Return the behaviours grouped by what they did, in order of name."""
    by_signature = defaultdict(list)
    for name, signature in signatures.items():
        if signature:
            by_signature[signature].append(name)
    return list(by_signature.values())


def _diversity(signatures: Mapping[str, Signature], names: Sequence[str]) -> list[Measure]:
    out = []
    for name in (WHOLE, *names):
        part = {
            behaviour: frozenset(entry for entry in signature if name in (WHOLE, entry[0]))
            for behaviour, signature in signatures.items()
        }
        groups = _groups(part)
        same = [group for group in groups if len(group) > 1]
        count = sum(len(group) for group in groups)
        out.append(
            Measure(
                check="policy_diversity",
                environment=name,
                value=float(len(groups)),
                message=f"{len(groups)} of {count} behaviours have histories of their own (lowest epsilon of each)",
            )
        )
        if name == WHOLE:
            continue
        told = "; ".join(" = ".join(group) for group in same)
        out.append(
            Measure(
                check="identical_behaviours",
                environment=name,
                value=float(sum(len(group) - 1 for group in same)),
                message=f"same histories on every env_seed: {told}" if same else "no two behaviours coincide",
            )
        )
    return out


def _histories(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    episodes = connection.table("health_episodes").filter(_ROLE_DATA)
    by_seed = episodes.aggregate(
        "environment, env_seed, count(*) AS n, count(DISTINCT history_id) AS distinct_n", "environment, env_seed"
    )
    found = {
        row["environment"]: row
        for row in rows(by_seed.aggregate("environment, sum(n)::BIGINT AS n, sum(distinct_n)::BIGINT AS distinct_n"))
    }
    out = []
    for name in names:
        row = found.get(name)
        value = 1 - row["distinct_n"] / row["n"] if row else None
        message = (
            f"{row['distinct_n']} distinct trajectories in {row['n']} episodes" if row else "no episodes of role data"
        )
        out.append(Measure(check="equal_histories", environment=name, value=value, message=message))
    return out


def audit_score(clusters: Sequence[RatioSums]) -> float | None:
    """Return how many standard errors the mean of u/mu - 1 lies from 0; None below two clusters.

    The error is the larger of two: clustered, G / (G - 1) * sum over clusters of (their sum of deviations)^2 / N^2, and
    row by row. u/mu is skewed (1/epsilon where the policy explored), so that few clusters can agree by chance; under
    right propensities the rows are martingale differences and their own error holds.
    """
    total = np.array([cluster.total for cluster in clusters])
    num = np.array([cluster.rows for cluster in clusters], dtype=np.float64)
    if len(clusters) < 2:
        return None
    mean = total.sum() / num.sum()
    factor = len(clusters) / (len(clusters) - 1)
    clustered = factor * ((total - num * mean) ** 2).sum() / num.sum() ** 2
    by_row = (sum(cluster.squares for cluster in clusters) / num.sum() - mean**2) / num.sum()
    variance = max(clustered, by_row)
    if variance <= 0:
        return 0.0 if mean == 0 else float("inf")
    return float(abs(mean) / np.sqrt(variance))


def _propensities(audit: TreeAudit, names: Sequence[str]) -> list[Measure]:
    out = []
    for name in (WHOLE, *names):
        found = [value for (environment, _), value in sorted(audit.ratios.items()) if name in (WHOLE, environment)]
        value, message = None, "no decision was drawn with 0 < epsilon < 1"
        if found:
            value = audit_score(found)
            count = sum(cluster.rows for cluster in found)
            mean = 1 + sum(cluster.total for cluster in found) / count
            message = f"mean of u/mu is {mean:.4f} over {count} decisions of {len(found)} env_seeds; expected 1"
            message += "; two env_seeds at least are needed" if value is None else ""
        out.append(Measure(check="propensity_audit", environment=name, value=value, message=message))
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str], audit: TreeAudit) -> list[Measure]:
    """Return the behaviour checks: diversity, multiplicity and propensities."""
    sound = "every propensity is one that its mixture can have"
    return [
        *_diversity(_signatures(connection), names),
        *_histories(connection, names),
        *audit.propensities.measures("propensity_consistent", names, sound),
        *_propensities(audit, names),
        *calibration(audit.calibration, names),
        *effective_sizes(ess_curves(connection, audit.all_log_ratios()), names),
    ]
