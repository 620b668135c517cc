"""Did every action do what it says, and did nothing happen without one."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.observations import slot_column
from esper.leyline.stages import BLENDED_STAGES, Stage
from quality.measures import Measure, offences

_PLACE = (
    "environment, episode_id, step, "
    "concat('slot ', slot, ': ', coalesce(cause, 'no action'), ', stage ', stage, ' -> ', next_stage) AS found"
)

# The last transition of an episode that did not complete is the failure's, not the lifecycle's.
_COUNTED = "NOT (terminated AND outcome <> 'completed')"

_ILLEGAL = """
SELECT c.* FROM health_changes AS c
WHERE stage <> next_stage
    AND NOT EXISTS (FROM health_legal AS l WHERE l.stage = c.stage AND l.next_stage = c.next_stage)
"""

_NO_EFFECT = """
SELECT c.* FROM health_changes AS c
WHERE cause IS NOT NULL AND (
    NOT EXISTS (
        FROM health_caused AS k WHERE k.op = c.cause AND k.stage = c.stage AND k.next_stage = c.next_stage)
    OR (cause = 'GERMINATE' AND same_levers IS NOT TRUE))
"""

_NO_CAUSE = """
SELECT c.* FROM health_changes AS c
WHERE cause IS NULL AND outcome <> 'rolled_back'
    AND EXISTS (FROM health_caused AS k WHERE k.stage = c.stage AND k.next_stage = c.next_stage AND NOT (
        c.has_patience AND k.op = 'PRUNE' AND k.stage = 6))
"""

# Only blending, committing and pruning what was blended move an episode to another lineage.
_WRONG_KEY = """
SELECT environment, episode_id, step, concat(op,
    CASE WHEN host_key = next_host_key THEN ' left the lineage as it was' ELSE ' changed the lineage' END) AS found
FROM (
    SELECT *, executed AND (op IN ('ADVANCE', 'FOSSILIZE')
        OR (op = 'PRUNE' AND (stages >> (4 * action_slot)) & 15 IN (4, 6))) AS moves
    FROM health_moves
    WHERE outcome <> 'rolled_back' AND NOT has_patience AND NOT (terminated AND outcome <> 'completed')
)
WHERE moves <> (host_key <> next_host_key)
"""

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


def _places(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    return connection.sql(query).filter(_COUNTED).project(_PLACE)


def illegal(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the changes of a slot's stage that the lifecycle does not have."""
    return _places(connection, _ILLEGAL)


def without_effect(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the contradictions between an action and the next state: no effect, or an effect without an action."""
    changes = _places(connection, _NO_EFFECT).union(_places(connection, _NO_CAUSE))
    return changes.union(connection.sql(_WRONG_KEY)).union(connection.sql(_ON_TRUNK))


def unpaired(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the rows on the never-act lineage that differ from the control."""
    return connection.sql(_UNPAIRED)


def wrong_flags(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return the decisions whose `executed` and `refused_by` contradict each other or the op."""
    return connection.sql(_FLAGS)


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
