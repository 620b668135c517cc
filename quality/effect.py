"""Does growth reach the network: seeds that were born, seeds that learned, hosts that changed."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from esper.leyline.actions import MAX_SLOTS
from esper.leyline.observations import slot_column
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from quality.measures import Measure, rows

_OCCUPIED = ", ".join(str(int(stage)) for stage in sorted(OCCUPIED_STAGES))

_BIRTHS = f"""
SELECT c.environment, c.episode_id, c.step,
    concat('GERMINATE in slot ', c.action_slot, ', then stage ', (n.next_stages >> (4 * c.action_slot)) & 15) AS found,
    (n.next_stages >> (4 * c.action_slot)) & 15 NOT IN ({_OCCUPIED}) AS wrong
FROM health_core AS c JOIN health_sequence AS n USING (number, step)
WHERE c.op = 'GERMINATE' AND c.executed AND NOT (c.terminated AND c.outcome <> 'completed')
    AND NOT coalesce(n.next_rollbacks > c.rollbacks, false)
"""  # noqa: S608 - constants alone

# A seed counts once an epoch of it is over; what a shorter life would show is not known.
_SEEDS = """
SELECT environment, episode_id, max(step)::INTEGER AS step, slot, birth,
    concat('slot ', slot, ', born at ', birth, ': gradient norm ', coalesce(max(norm)::VARCHAR, 'null'), ' over ',
        count(*), ' rows') AS found,
    NOT coalesce(max(norm) > 0, false) AS wrong
FROM ({parts}) GROUP BY environment, episode_id, slot, birth
"""

_GROWN = """
SELECT environment, episode_id, NULL::INTEGER AS step,
    concat(count(*), ' rows with a blended seed, all with the loss of the control') AS found,
    NOT coalesce(bool_or(val_loss <> control_val_loss), true) AS wrong
FROM health_core WHERE blended AND root = 'host' GROUP BY environment, episode_id
"""


def births(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return every executed germination, `wrong` where the slot holds no seed afterwards."""
    return connection.sql(_BIRTHS)


def seeds(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return every seed that was trained for an epoch, `wrong` where its gradient was never more than zero."""
    parts = []
    for slot in range(MAX_SLOTS):
        stage, norm, age = (slot_column(slot, name) for name in ("stage", "gradient_norm", "age"))
        parts.append(
            f"SELECT environment, episode_id, step, {slot} AS slot, step - {age} AS birth, {norm} AS norm "  # noqa: S608
            f"FROM health_rows WHERE {age} >= 1 AND {stage} IN ({int(Stage.TRAINING)}, {int(Stage.BLENDING)})"
        )
    return connection.sql(_SEEDS.format(parts=" UNION ALL ".join(parts)))


def grown(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Return every episode that blended a seed, `wrong` where its losses are the control's throughout."""
    return connection.sql(_GROWN)


def _share(
    check: str, names: Sequence[str], relation: duckdb.DuckDBPyRelation, *, none: str, told: str
) -> list[Measure]:
    """Return the share of wrong ones in each environment."""
    example = "min(concat('episode ', episode_id, ' step ' || step, ': ', found)) FILTER (wrong)"
    grouped = relation.aggregate(f"environment, count(*) AS n, count(*) FILTER (wrong) AS bad, {example} AS example")
    found = {row["environment"]: row for row in rows(grouped)}
    out = []
    for name in names:
        row = found.get(name)
        value, message = None, none
        if row is not None:
            value = row["bad"] / row["n"]
            message = f"{row['bad']} of {row['n']} {told}"
            message += f"; for example {row['example']}" if row["bad"] else ""
        out.append(Measure(check=check, environment=name, value=value, message=message))
    return out


def measure(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Measure]:
    """Return `germinations_make_seeds`, `seeds_receive_gradient` and `growth_changes_host`."""
    return [
        *_share(
            "germinations_make_seeds",
            names,
            births(connection),
            none="no germination was executed",
            told="executed germinations left the slot without a seed",
        ),
        *_share(
            "seeds_receive_gradient",
            names,
            seeds(connection),
            none="no seed was trained for an epoch",
            told="trained seeds never had a gradient",
        ),
        *_share(
            "growth_changes_host",
            names,
            grown(connection),
            none="no episode blended a seed",
            told="episodes with a blended seed have the control's losses",
        ),
    ]
