"""Did every action do what it says, and did nothing happen without one."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from quality.measures import Measure, offences, rows

_WHERE = (
    "concat('episode ', episode_id, ' step ', step, ' slot ', slot, ': ', coalesce(cause, 'no action'), ', stage ', "
)
_PLACE = _WHERE + "stage, ' -> ', next_stage)"

# The last transition of an episode that did not complete is the failure's, not the lifecycle's.
_COUNTED = "NOT (terminated AND outcome <> 'completed')"

_ILLEGAL = """
SELECT c.* FROM health_changes AS c
WHERE stage IS DISTINCT FROM next_stage
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
SELECT environment, concat('episode ', episode_id, ' step ', step, ': ', op,
    CASE WHEN host_key = next_host_key THEN ' left the lineage as it was' ELSE ' changed the lineage' END) AS example
FROM (
    SELECT *, executed AND (op IN ('ADVANCE', 'FOSSILIZE') OR (op = 'PRUNE' AND stages[action_slot + 1] IN (4, 6)))
        AS moves
    FROM health_moves
    WHERE outcome <> 'rolled_back' AND NOT has_patience AND NOT (terminated AND outcome <> 'completed')
)
WHERE moves <> (host_key <> next_host_key)
"""

_ON_TRUNK = """
SELECT environment,
    concat('episode ', episode_id, ' step ', step, ': a blended seed on the never-act lineage') AS example
FROM health_observed WHERE blended AND host_key = root_key AND root = 'host'
"""

_UNPAIRED = """
SELECT environment,
    concat('episode ', episode_id, ' step ', step, ': loss ', val_loss, ', control ', control_val_loss) AS example
FROM health_observed
WHERE root = 'host' AND host_key = root_key AND abs(val_loss - control_val_loss) > 1e-6 * (1 + abs(control_val_loss))
    AND isfinite(val_loss) AND isfinite(control_val_loss)
"""

_GROWN = """
SELECT environment, count(*) AS grown, count(*) FILTER (NOT differs) AS same,
    min(episode_id) FILTER (NOT differs) AS example
FROM (
    SELECT environment, episode_id, coalesce(bool_or(val_loss <> control_val_loss), true) AS differs
    FROM health_observed WHERE blended AND root = 'host' GROUP BY environment, episode_id
) GROUP BY environment
"""


def _growth(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    found = {row["environment"]: row for row in rows(connection.sql(_GROWN))}
    out = []
    for name in names:
        row = found.get(name)
        value, message = None, "no episode blended a seed"
        if row is not None:
            value = row["same"] / row["grown"]
            message = f"{row['same']} of {row['grown']} episodes with a blended seed have the control's losses"
            message += f"; for example {row['example']}" if row["same"] else ""
        out.append(Measure(check="growth_changes_host", environment=name, value=value, message=message))
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `legal_transitions`, `interventions_have_effect`, `paired_control` and `growth_changes_host`."""

    def places(query: str) -> duckdb.DuckDBPyRelation:
        return connection.sql(query).filter(_COUNTED).project(f"environment, {_PLACE} AS example")

    changes = places(_NO_EFFECT).union(places(_NO_CAUSE))
    changes = changes.union(connection.sql(_WRONG_KEY)).union(connection.sql(_ON_TRUNK))
    return [
        *offences("legal_transitions", names, places(_ILLEGAL), unit="transitions", sound="every transition is legal"),
        *offences(
            "interventions_have_effect",
            names,
            changes,
            unit="contradictions between action and next state",
            sound="every executed action had its effect, and nothing else changed",
        ),
        *offences("paired_control", names, connection.sql(_UNPAIRED), sound="untouched hosts equal their control"),
        *_growth(connection, names),
    ]
