"""What the health page draws, aggregated in SQL over one sealed version.

Decisions count where an offline learner reads them: role data, not forced, not a replayed prefix. All numbers are of
role data; what was evaluated or trained live is the business of the run's report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from esper.karn.catalogue import connect
from esper.karn.store import Version
from esper.leyline.actions import (
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    NUM_LEVER_CHOICES,
    NUM_OPS,
    TREE_WIDTH,
    Op,
    lever_slice,
    unpack_mask,
)
from esper.leyline.host_specs import BLUEPRINTS
from esper.leyline.rewards import RewardSpec

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

ENTROPY_WINDOW = 5
"""Steps, centred, over which the ops of a single behaviour are counted: a few episodes make noise of one step."""

MASK_BYTES = (TREE_WIDTH + 7) // 8

NUM_BINS = 20
"""Bins of the stated probability in the calibration."""

_DECISIONS = """
CREATE OR REPLACE TEMP VIEW page_decisions AS
SELECT environment, env_seed, episode_id, actor, step, op, action_slot, {levers}, valid_ops, valid_slots, tree_mask,
    epsilon, temperature, behaviour_logp, op_probs
FROM steps WHERE NOT is_last AND NOT forced AND NOT replayed AND op IN ({ops}) AND role = 'data'
    AND environment IS NOT NULL AND actor IS NOT NULL AND step IS NOT NULL
"""
"""Rows that no figure can hold are left out here and below: the page is there for faulty data too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How often each choice was there and was taken.

    Attributes:
        taken_SO: Decisions by slot and op, [S, 4]: GERMINATE, ADVANCE, FOSSILIZE, PRUNE.
        valid_SO: Decisions in which that op was valid in that slot, [S, 4].
        germinated_BL: Germinations by blueprint and lever value, [8, 18]: blend, tempo, dwell, isolation, seed_lr.
        possible_BL: Whether the pair was ever valid in one state, [8, 18].
        blueprints: The names of the eight.
    """

    taken_SO: Counts
    valid_SO: Counts
    germinated_BL: Counts
    possible_BL: NDArray[np.bool_]
    blueprints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Stated probabilities of ops against what was drawn, one entry a bin.

    Attributes:
        stated: Mean stated probability.
        taken: Share of the draws in which the op was taken.
        draws: Number of (decision, op) pairs.
    """

    stated: Floats
    taken: Floats
    draws: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPageData:
    """Everything that the page draws; outer keys are environments, inner ones behaviours.

    Attributes:
        shares: Share of each op (by name) among the behaviour's decisions.
        entropies: (step, nats of the op) of all behaviours together (key ""), and of each over ENTROPY_WINDOW steps.
        coverage: The coverage map.
        returns: The episodes' returns, or their paired accuracy points where the reward is unknown.
        in_points: Environments whose `returns` are points.
        sample_sizes: (step, effective episodes) for the behaviour's own greedy policy as target, and the number of
            episodes that it is estimated from.
        calibration: Stated op probabilities against frequencies.
    """

    shares: dict[str, dict[str, dict[str, float]]]
    entropies: dict[str, dict[str, list[tuple[int, float]]]]
    coverage: dict[str, Coverage]
    returns: dict[str, dict[str, list[float]]]
    in_points: frozenset[str]
    sample_sizes: dict[str, dict[str, tuple[list[tuple[int, float]], int]]]
    calibration: dict[str, Calibration]


def read_page_data(version: Version, rewards: Mapping[str, RewardSpec]) -> HealthPageData:
    """Return what the page draws.

    Args:
        version: The sealed version.
        rewards: The reward of each environment by name, as far as they are known.

    Raises:
        IntegrityError: A file of the version is missing or damaged.
    """
    connection = connect(version)
    try:
        levers, ops = ", ".join(f"action_{lever}" for lever in LEVERS), ", ".join(f"'{op.name}'" for op in Op)
        connection.execute(_DECISIONS.format(levers=levers, ops=ops))
        counts = _op_counts(connection)
        returns = _returns(connection, rewards)
        return HealthPageData(
            shares=_shares(counts),
            entropies=_entropies(counts),
            coverage=_coverage(connection),
            returns=returns,
            in_points=frozenset(returns) - frozenset(rewards),
            sample_sizes=_sample_sizes(connection),
            calibration=_calibration(connection),
        )
    finally:
        connection.close()


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = connection.sql(sql).to_arrow_table().to_pylist()
    return result


OpCounts = dict[tuple[str, str, int], Counts]
"""By environment, behaviour and step: decisions of each op, [5]."""


def _op_counts(connection: duckdb.DuckDBPyConnection) -> OpCounts:
    found: OpCounts = defaultdict(lambda: np.zeros(NUM_OPS, dtype=np.int64))
    sql = "SELECT environment, actor, step, op, count(*) AS n FROM page_decisions GROUP BY ALL ORDER BY ALL"
    for row in _rows(connection, sql):
        found[row["environment"], row["actor"], row["step"]][Op[row["op"]]] += row["n"]
    return found


def _shares(counts: OpCounts) -> dict[str, dict[str, dict[str, float]]]:
    totals: dict[str, dict[str, Counts]] = defaultdict(lambda: defaultdict(lambda: np.zeros(NUM_OPS, dtype=np.int64)))
    for (environment, actor, _), number in counts.items():
        totals[environment][actor] += number
    return {
        environment: {
            actor: {op.name: float(number[op] / number.sum()) for op in Op} for actor, number in actors.items()
        }
        for environment, actors in totals.items()
    }


def _nats(counts: Counts) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def _entropies(counts: OpCounts) -> dict[str, dict[str, list[tuple[int, float]]]]:
    pooled: dict[str, dict[int, Counts]] = defaultdict(lambda: defaultdict(lambda: np.zeros(NUM_OPS, dtype=np.int64)))
    found: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for (environment, _, step), number in counts.items():
        pooled[environment][step] += number
    for environment, steps in pooled.items():
        found[environment][""] = [(step, _nats(steps[step])) for step in sorted(steps)]
    for environment, actor in sorted({(environment, actor) for environment, actor, _ in counts}):
        own = {step: number for (*place, step), number in counts.items() if place == [environment, actor]}
        for step in sorted(own):
            near = [own[at] for at in own if abs(at - step) <= ENTROPY_WINDOW // 2]
            found[environment][actor].append((step, _nats(np.sum(near, axis=0))))
    return {environment: dict(lines) for environment, lines in found.items()}


_TRANSFORMERS = """
SELECT DISTINCT environment FROM episodes WHERE contains(environment_spec, '"kind":"transformer"')
"""
"""As the view `decisions` has it: the specification is read as text, since it may be damaged."""


def _coverage(connection: duckdb.DuckDBPyConnection) -> dict[str, Coverage]:
    ops = list(Op)[1:]
    parts = [
        f"count(*) FILTER (op = '{op.name}' AND action_slot = {slot}) AS taken_{slot}_{int(op)}, "
        f"count(*) FILTER (valid_slots[{int(op) + 1}] & {1 << slot} > 0) AS valid_{slot}_{int(op)}"
        for slot in range(MAX_SLOTS)
        for op in ops
    ]
    relation = connection.table("page_decisions").aggregate(f"environment, {', '.join(parts)}", "environment")
    counted: list[dict[str, Any]] = relation.order("environment").to_arrow_table().to_pylist()
    germinated, possible = _germinated(connection), _possible(connection)
    transformers = {row["environment"] for row in _rows(connection, _TRANSFORMERS)}
    found = {}
    for row in counted:
        name = row["environment"]
        taken, valid = (
            np.array([[row[f"{kind}_{slot}_{int(op)}"] for op in ops] for slot in range(MAX_SLOTS)], dtype=np.int64)
            for kind in ("taken", "valid")
        )
        used = int(np.flatnonzero((taken + valid).any(axis=1)).max(initial=-1)) + 1
        found[name] = Coverage(
            taken_SO=taken[:used],
            valid_SO=valid[:used],
            germinated_BL=germinated.get(name, _no_pairs()),
            possible_BL=possible.get(name, _no_pairs().astype(bool)),
            blueprints=BLUEPRINTS["transformer" if name in transformers else "cnn"],
        )
    return found


def _no_pairs() -> Counts:
    return np.zeros((LEVER_SIZES[0], NUM_LEVER_CHOICES - LEVER_SIZES[0]), dtype=np.int64)


def _germinated(connection: duckdb.DuckDBPyConnection) -> dict[str, Counts]:
    columns = [f"action_{lever}" for lever in LEVERS]
    within = " AND ".join(f"{column} BETWEEN 0 AND {size - 1}" for column, size in zip(columns, LEVER_SIZES))
    sql = (
        f"SELECT environment, {', '.join(columns)}, count(*) AS n FROM page_decisions WHERE op = 'GERMINATE' "  # noqa: S608 - constants alone
        f"AND {within} GROUP BY ALL ORDER BY ALL"
    )
    found: dict[str, Counts] = defaultdict(_no_pairs)
    for row in _rows(connection, sql):
        start = 0
        for column, size in zip(columns[1:], LEVER_SIZES[1:]):
            found[row["environment"]][row[columns[0]], start + row[column]] += row["n"]
            start += size
    return found


def _possible(connection: duckdb.DuckDBPyConnection) -> dict[str, NDArray[np.bool_]]:
    """Which pairs of a blueprint and another lever's value some mask allowed together."""
    found: dict[str, NDArray[np.bool_]] = {}
    sql = f"SELECT DISTINCT environment, tree_mask FROM page_decisions WHERE octet_length(tree_mask) = {MASK_BYTES}"  # noqa: S608
    by_environment: dict[str, list[bytes]] = defaultdict(list)
    for row in _rows(connection, sql):
        by_environment[row["environment"]].append(row["tree_mask"])
    for environment, packed in by_environment.items():
        mask_NT = unpack_mask(np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1))
        pairs = _no_pairs().astype(bool)
        for slot in range(MAX_SLOTS):
            blueprints = mask_NT[:, lever_slice(slot, 0)].astype(np.int64)
            others = mask_NT[:, lever_slice(slot, 1).start : lever_slice(slot, len(LEVERS) - 1).stop].astype(np.int64)
            pairs |= (blueprints.T @ others) > 0
        found[environment] = pairs
    return found


def _returns(
    connection: duckdb.DuckDBPyConnection, rewards: Mapping[str, RewardSpec]
) -> dict[str, dict[str, list[float]]]:
    sql = (
        "SELECT r.environment, r.controller, r.accuracy_points, r.growth_log2 FROM returns AS r "
        "JOIN episodes AS e USING (episode_id) WHERE e.role = 'data' AND e.branch_parent IS NULL "
        "AND r.outcome <> 'failed' AND r.control_valid AND r.accuracy_points IS NOT NULL "
        "AND r.growth_log2 IS NOT NULL ORDER BY ALL"
    )
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(connection, sql):
        reward = rewards.get(row["environment"])
        value = row["accuracy_points"]
        if reward is not None:  # the sum of `combine` over an episode, in either mode
            value = (value - reward.rent_points * row["growth_log2"]) / reward.scale_points
        if np.isfinite(value):
            found[row["environment"]][row["controller"]].append(value)
    return {environment: dict(behaviours) for environment, behaviours in found.items()}


_RATIOS = """
WITH weights AS (
    SELECT environment, actor, episode_id, step, sum(CASE WHEN behaviour_logp < ln(1 - epsilon) - 1e-6 THEN -1e9
        ELSE -behaviour_logp END) OVER (PARTITION BY episode_id ORDER BY step) AS log_weight
    FROM page_decisions WHERE epsilon > 0 AND epsilon < 0.5 AND behaviour_logp IS NOT NULL AND temperature IS NULL
), steps_seen AS (
    SELECT DISTINCT environment, actor, step FROM weights
), drawn AS (
    SELECT DISTINCT environment, actor, episode_id FROM weights
), filled AS (
    SELECT environment, actor, s.step, episode_id, w.log_weight
    FROM steps_seen AS s JOIN drawn USING (environment, actor) ASOF LEFT JOIN weights AS w USING (episode_id, step)
)
SELECT environment, actor, step, count(*) AS episodes,
    sum(exp(coalesce(log_weight, 0))) AS total, sum(exp(2 * coalesce(log_weight, 0))) AS squares
FROM filled GROUP BY ALL ORDER BY ALL
"""
"""Weights of the target that always takes the behaviour's greedy action: 1 / mu where it was taken, else 0. Below
epsilon 0.5 mu >= 1 - epsilon holds exactly where the action is the greedy one. A step that was forced for an episode
leaves its weight as it was."""


def _sample_sizes(
    connection: duckdb.DuckDBPyConnection,
) -> dict[str, dict[str, tuple[list[tuple[int, float]], int]]]:
    found: dict[str, dict[str, tuple[list[tuple[int, float]], int]]] = defaultdict(dict)
    for row in _rows(connection, _RATIOS):
        size = row["total"] ** 2 / row["squares"] if row["squares"] > 0 else 0.0
        if not np.isfinite(size):
            continue
        line, _ = found[row["environment"]].setdefault(row["actor"], ([], row["episodes"]))
        line.append((row["step"], size))
    return dict(found)


_CALIBRATION = f"""
WITH pairs AS (
    SELECT environment, op, unnest(op_probs) AS stated, generate_subscripts(op_probs, 1) AS place
    FROM page_decisions WHERE op_probs IS NOT NULL
)
SELECT environment, floor(stated * {NUM_BINS}) AS bin, avg(stated) AS stated, count(*) AS draws,
    avg((op = CASE place {" ".join(f"WHEN {int(op) + 1} THEN '{op.name}'" for op in Op)} END)::INTEGER) AS taken
FROM pairs WHERE stated > 0 AND stated < 1 GROUP BY environment, bin ORDER BY environment, bin
"""  # noqa: S608 - constants alone


def _calibration(connection: duckdb.DuckDBPyConnection) -> dict[str, Calibration]:
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(connection, _CALIBRATION):
        grouped[row["environment"]].append(row)
    return {
        environment: Calibration(
            stated=np.array([row["stated"] for row in rows]),
            taken=np.array([row["taken"] for row in rows]),
            draws=np.array([row["draws"] for row in rows], dtype=np.int64),
        )
        for environment, rows in grouped.items()
    }
