"""Did every action do what it says, and did nothing happen without one."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from esper.leyline.actions import MAX_SLOTS, TEMPO_EPOCHS
from esper.leyline.gate_thresholds import (
    G2_MIN_GRADIENT_RATIO,
    G2_MIN_IMPROVEMENT_POINTS,
    G2_VANISHED_SHARE,
    G5_MIN_REMOVAL_COST_POINTS,
)
from esper.leyline.observations import slot_column
from esper.leyline.stages import BLENDED_STAGES, COOLDOWN_EPOCHS, LIVE_STAGES, Stage
from quality.measures import Measure, offences

_PLACE = (
    "environment, episode_id, step, "
    "concat('slot ', slot, ': ', coalesce(cause, 'no action'), ', stage ', stage, ' -> ', next_stage) AS found"
)

# The last transition of an episode that did not complete is the failure's, not the lifecycle's.
_COUNTED = "NOT (terminated AND outcome <> 'completed')"

_ILLEGAL = """
SELECT c.* FROM health_changes AS c
WHERE stage <> next_stage AND NOT rolled_back
    AND NOT EXISTS (FROM health_legal AS l WHERE l.asks = c.asks AND l.stage = c.stage AND l.next_stage = c.next_stage)
"""

_NO_EFFECT = """
SELECT c.* FROM health_changes AS c
WHERE cause IS NOT NULL AND NOT rolled_back AND (
    NOT EXISTS (
        FROM health_caused AS k
        WHERE k.asks = c.asks AND k.op = c.cause AND k.stage = c.stage AND k.next_stage = c.next_stage)
    OR (cause = 'GERMINATE' AND same_levers IS NOT TRUE))
"""

_NO_CAUSE = """
SELECT c.* FROM health_changes AS c
WHERE cause IS NULL AND NOT rolled_back
    AND EXISTS (FROM health_caused AS k
        WHERE k.asks = c.asks AND k.stage = c.stage AND k.next_stage = c.next_stage AND NOT (
            c.has_patience AND k.op = 'PRUNE' AND k.stage = 6))
"""

# Only blending, committing and pruning what was blended move an episode to another lineage.
_WRONG_KEY = """
SELECT environment, episode_id, step, concat(op,
    CASE WHEN host_key = next_host_key THEN ' left the lineage as it was' ELSE ' changed the lineage' END) AS found
FROM (
    SELECT *, executed AND (op = 'FOSSILIZE'
        OR (op = 'ADVANCE' AND (NOT asks OR (stages >> (4 * action_slot)) & 15 = 3))
        OR (op = 'PRUNE' AND (stages >> (4 * action_slot)) & 15 IN (4, 6))) AS moves
    FROM health_moves
    WHERE NOT rolled_back AND NOT has_patience AND NOT (terminated AND outcome <> 'completed')
)
WHERE moves <> (host_key <> next_host_key)
"""

# In the epoch of a rollback the governor has the last word: no live seed is left, whatever the action was.
_OUTLIVED = f"""
SELECT environment, episode_id, step, concat('slot ', slot, ': a live seed outlived a rollback') AS found
FROM health_moves CROSS JOIN (SELECT range::INTEGER AS slot FROM range({MAX_SLOTS}))
WHERE rolled_back AND (next_stages >> (4 * slot)) & 15 IN ({", ".join(str(int(s)) for s in sorted(LIVE_STAGES))})
"""  # noqa: S608 - constants alone

_ON_TRUNK = """
SELECT c.environment, c.episode_id, c.step, 'a blended seed on the never-act lineage' AS found
FROM health_core AS c JOIN (SELECT number, host_key AS root_key FROM health_core WHERE step = 0) USING (number)
WHERE blended AND host_key = root_key AND root = 'host'
"""

_UNPAIRED = """
SELECT c.environment, c.episode_id, c.step, concat('loss ', val_loss, ', control ', control_val_loss) AS found
FROM health_core AS c JOIN (SELECT number, host_key AS root_key FROM health_core WHERE step = 0) USING (number)
WHERE root = 'host' AND host_key = root_key AND abs(val_loss - control_val_loss) > 1e-6 * (1 + abs(control_val_loss))
    AND isfinite(val_loss) AND isfinite(control_val_loss)
"""

_FLAGS = """
SELECT environment, episode_id, step, CASE
    WHEN executed THEN concat(op, ' is executed, and refused by ', refused_by)
    WHEN refused_by IS NULL THEN concat(op, ' is not executed, and no gate refused it')
    ELSE concat(op, ' is refused by ', refused_by, ', but has no gate') END AS found
FROM health_core
WHERE NOT is_last AND executed IS NOT NULL
    AND (executed <> (refused_by IS NULL) OR (NOT executed AND op NOT IN ('ADVANCE', 'FOSSILIZE')))
"""

GATE_SLACK = 1e-4
"""Measures are stored as float32: what stood at a threshold may lie below it by a rounding."""


def _of_action(name: str) -> str:
    """The SQL of a slot feature in the slot of the action."""
    return f"CASE action_slot {' '.join(f'WHEN {s} THEN {slot_column(s, name)}' for s in range(MAX_SLOTS))} END"


_THROUGH_CLOSED_GATES = f"""
SELECT environment, episode_id, step, concat(op, CASE WHEN executed THEN ' went through a closed strict gate'
    ELSE concat(' is refused by ', refused_by, ', which no permissive gate measures') END) AS found
FROM (
    SELECT *, {_of_action("stage")} AS stage, {_of_action("seed_improvement")} AS improvement,
        {_of_action("gradient_vanishing")} AS vanishing, {_of_action("gradient_ratio")} AS ratio,
        {_of_action("removal_cost")} AS cost
    FROM health_rows WHERE NOT is_last AND op IN ('ADVANCE', 'FOSSILIZE')
)
WHERE CASE
    WHEN NOT strict THEN coalesce(regexp_matches(refused_by, 'seed_improvement|gradient_alive|removal_cost'), false)
    WHEN NOT executed THEN false
    WHEN op = 'FOSSILIZE' THEN coalesce(cost, -1) < {G5_MIN_REMOVAL_COST_POINTS - GATE_SLACK}
    WHEN stage = {int(Stage.TRAINING)} THEN coalesce(improvement, -1) < {G2_MIN_IMPROVEMENT_POINTS - GATE_SLACK}
        OR coalesce(vanishing, 1) >= {G2_VANISHED_SHARE} OR coalesce(ratio, 0) < {G2_MIN_GRADIENT_RATIO - GATE_SLACK}
    ELSE false END
"""  # noqa: S608 - constants alone


def _overstayed(slot: int) -> str:
    """The SQL of whether a slot is in a stage that it must have left by itself, or never enters."""
    stage, epochs, tempo = (slot_column(slot, name) for name in ("stage", "epochs_in_stage", "tempo"))
    full = f"list_extract({list(TEMPO_EPOCHS)}, {tempo}::INTEGER + 1)"
    cases = [
        f"WHEN {int(Stage.GERMINATED)} THEN NOT asks",
        f"WHEN {int(Stage.BLENDING)} THEN NOT asks AND {epochs} >= {full}",
        f"WHEN {int(Stage.HOLDING)} THEN {epochs} >= patience + asks::INTEGER",
        *(f"WHEN {int(cooling)} THEN {epochs} >= {length}" for cooling, length in COOLDOWN_EPOCHS.items()),
    ]
    return f"coalesce(CASE {stage}::INTEGER {' '.join(cases)} END, false)"


def _places(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    return connection.sql(query).filter(_COUNTED).project(_PLACE)


def illegal(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the changes of a slot's stage that the lifecycle does not have, and the stages that lasted too long."""
    tests = {slot: _overstayed(slot) for slot in range(MAX_SLOTS)}
    told = (
        f"CASE WHEN {test} THEN concat('slot {slot}: stage ', {slot_column(slot, 'stage')}, ' after ', "
        f"{slot_column(slot, 'epochs_in_stage')}, ' epochs in it') END"
        for slot, test in tests.items()
    )
    late = connection.table("health_rows").filter(" OR ".join(tests.values()))
    found = f"environment, episode_id, step, concat_ws(', ', {', '.join(told)}) AS found"
    return _places(connection, _ILLEGAL).union(late.project(found))


def without_effect(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the contradictions between an action and the next state: no effect, or an effect without an action."""
    changes = _places(connection, _NO_EFFECT).union(_places(connection, _NO_CAUSE))
    for query in (_WRONG_KEY, _OUTLIVED, _ON_TRUNK):
        changes = changes.union(connection.sql(query))
    return changes


def unpaired(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows on the never-act lineage that differ from the control."""
    return connection.sql(_UNPAIRED)


def wrong_flags(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the decisions whose `executed` and `refused_by` contradict each other, the op or the gate's measures."""
    return connection.sql(_FLAGS).union(connection.sql(_THROUGH_CLOSED_GATES))


def wrong_alpha(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows with an alpha outside [0, 1], one without a blended seed, or a full seed below 1."""
    blended = ", ".join(str(int(stage)) for stage in sorted(BLENDED_STAGES))
    full = f"{int(Stage.HOLDING)}, {int(Stage.FOSSILIZED)}"
    wrong, told = [], []
    for slot in range(MAX_SLOTS):
        alpha, stage = slot_column(slot, "alpha"), slot_column(slot, "stage")
        test = (
            f"coalesce(isfinite({alpha}) AND ({alpha} NOT BETWEEN 0 AND 1.00001 OR ({alpha} > 0 AND {stage} NOT IN "
            f"({blended})) OR ({alpha} < 0.99999 AND {stage} IN ({full}))), false)"
        )
        wrong.append(test)
        told.append(f"CASE WHEN {test} THEN concat('{alpha} = ', {alpha}, ' at stage ', {stage}) END")
    found = f"concat_ws(', ', {', '.join(told)}) AS found"
    rows_there = connection.table("health_rows").filter(" OR ".join(wrong))
    return rows_there.project(f"environment, episode_id, step, {found}")


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return the checks of what actions did."""
    effect = "every executed action had its effect, and nothing else changed"
    return [
        *offences(
            "legal_transitions", names, illegal(connection), unit="transitions", sound="every transition is legal"
        ),
        *offences(
            "interventions_have_effect",
            names,
            without_effect(connection),
            unit="contradictions between action and next state",
            sound=effect,
        ),
        *offences("executed_flags", names, wrong_flags(connection), sound="refused is what a gate refused"),
        *offences("alpha_range", names, wrong_alpha(connection), sound="alpha is in [0, 1] and follows the stage"),
        *offences("paired_control", names, unpaired(connection), sound="untouched hosts equal their control"),
    ]
