"""The working tables of the checks, made once per connection: which episodes are sound, and what each decision changed.

A structurally broken episode is the business of `structure` and `duplicates` alone; every later check reads the sound
ones, so that one fault does not set off unrelated alarms. The columns that most checks read are copied into memory
once (`health_core`); features are read from the files by the few checks that need them.
"""

from __future__ import annotations

import duckdb

from esper.leyline.actions import LEVERS, MAX_SLOTS, Op
from esper.leyline.observations import slot_column
from esper.leyline.schema import ACTION_FIELDS
from esper.leyline.stages import BLENDED_STAGES, COOLDOWN_EPOCHS, LEGAL_TRANSITIONS, LIVE_STAGES, Stage

_EPISODES = """
CREATE OR REPLACE TEMP TABLE health_episodes AS
WITH seen AS (
    SELECT episode_id, count(*) AS num_rows, count(DISTINCT step) AS num_distinct, min(step) AS first,
        max(step) AS last, count(DISTINCT step) FILTER (is_last) AS finals, max(step) FILTER (is_last) AS final_step,
        count(DISTINCT (step, actor)) AS num_keys
    FROM steps GROUP BY episode_id
), told AS (
    SELECT episode_id, any_value(environment) AS environment, any_value(env_seed) AS env_seed,
        any_value(role) AS role, any_value(controller) AS controller, any_value(epsilon) AS epsilon,
        any_value(temperature) AS temperature, any_value(plan) AS plan, any_value(history_id) AS history_id,
        any_value(controller_spec ->> '$.kind') AS kind, any_value(root) AS root, any_value(outcome) AS outcome,
        any_value(environment_id) AS environment_id, any_value(control_valid) AS control_valid,
        any_value((environment_spec ->> '$.holding_patience') IS NOT NULL) AS has_patience,
        any_value((environment_spec ->> '$.holding_patience')::INTEGER) AS patience,
        coalesce(any_value((environment_spec ->> '$.ask_at_every_gate')::BOOLEAN), false) AS asks,
        coalesce(any_value(environment_spec ->> '$.gates'), 'permissive') = 'strict' AS strict,
        any_value((environment_spec ->> '$.horizon')::INTEGER) AS horizon,
        any_value(branch_parent) AS branch_parent, any_value(branch_step) AS branch_step,
        max(num_steps) AS num_steps, count(*) AS copies,
        any_value(final_val_accuracy) AS final_val_accuracy, any_value(final_seed_params) AS final_seed_params,
        any_value(control_final_val_accuracy) AS control_final_val_accuracy
    FROM episodes GROUP BY episode_id
), joined AS (
    SELECT told.*, seen.* EXCLUDE (episode_id),
        outcome = 'failed' AS failed,
        copies > 1 OR coalesce(num_rows > num_keys, false) AS doubled,
        coalesce(num_distinct, 0) <> num_steps + 1 OR first <> 0 OR last <> num_steps OR finals <> 1
            OR final_step <> last OR num_rows IS NULL OR final_step IS NULL AS broken
    FROM told LEFT JOIN seen USING (episode_id)
)
SELECT *, NOT failed AND NOT doubled AND NOT broken AND num_rows = num_distinct AS sound,
    (row_number() OVER (ORDER BY episode_id))::INTEGER AS number
FROM joined
"""

# Views are temporary: a catalogue's connection cannot write to its own database.
_ROWS = """
CREATE OR REPLACE TEMP VIEW health_rows AS
SELECT s.*, e.outcome, e.root, e.has_patience, e.patience, e.asks, e.strict, e.kind, e.number, e.environment_id
FROM steps AS s JOIN health_episodes AS e USING (episode_id) WHERE e.sound
"""

_COPIED = (
    *("episode_id", "environment", "env_seed", "step", "actor", "role", "host_key", "is_last", "replayed", "forced"),
    *("op", *ACTION_FIELDS, "executed", "refused_by", "valid_ops", "valid_slots", "epsilon", "horizon", "num_slots"),
    *("val_loss", "val_accuracy", "control_val_loss", "control_val_accuracy", "seed_params", "host_params"),
    *("reward_accuracy_points", "reward_growth_log2"),
    *("final_val_accuracy", "control_final_val_accuracy", "final_seed_params", "terminated", "truncated"),
    *("outcome", "root", "has_patience", "asks", "number"),
)


def stage_code() -> str:
    """Return the SQL of one integer that holds the stages of all slots, four bits each; a missing stage is 0."""
    return " | ".join(
        f"(coalesce({slot_column(slot, 'stage')}, 0)::INTEGER << {4 * slot})" for slot in range(MAX_SLOTS)
    )


def _blended() -> str:
    stages = ", ".join(str(int(stage)) for stage in sorted(BLENDED_STAGES))
    return " OR ".join(f"{slot_column(slot, 'stage')} IN ({stages})" for slot in range(MAX_SLOTS))


_CORE = f"""
CREATE OR REPLACE TEMP TABLE health_core AS
SELECT {", ".join(_COPIED)}, hash(state_id) AS state_hash,
    {stage_code()} AS stages, coalesce({_blended()}, false) AS blended, coalesce(num_rollbacks, 0)::INTEGER AS rollbacks
FROM health_rows
"""  # noqa: S608 - constants alone

# Only the lineage's key at the start and the row after are needed, so that the window holds three columns of each.
_SEQUENCE = """
CREATE OR REPLACE TEMP TABLE health_sequence AS
SELECT number, step, lead(stages) OVER after AS next_stages, lead(host_key) OVER after AS next_host_key,
    lead(rollbacks) OVER after AS next_rollbacks
FROM health_core WINDOW after AS (PARTITION BY number ORDER BY step)
"""

_MOVES = """
CREATE OR REPLACE TEMP TABLE health_moves AS
SELECT c.episode_id, c.environment, c.number, c.step, c.op, c.action_slot, c.executed, c.host_key, c.outcome, c.root,
    c.has_patience, c.asks, c.terminated, c.stages, n.next_stages, n.next_host_key,
    n.next_rollbacks > c.rollbacks AS rolled_back
FROM health_core AS c JOIN health_sequence AS n USING (number, step)
WHERE NOT c.is_last AND (c.stages <> n.next_stages OR c.host_key <> n.next_host_key OR (c.executed AND c.op <> 'WAIT'))
"""


def _levers_after() -> str:
    """The SQL list of the levers that the next row (`n`) shows in the slot of the action (`c`)."""
    of_slot = (
        f"WHEN {slot} THEN [{', '.join(f'n.{slot_column(slot, lever)}' for lever in LEVERS)}]"
        for slot in range(MAX_SLOTS)
    )
    return f"CASE c.action_slot {' '.join(of_slot)} END"


_BIRTHS = f"""
CREATE OR REPLACE TEMP TABLE health_births AS
SELECT c.number, c.step,
    [{", ".join(f"c.{name}::INTEGER" for name in ACTION_FIELDS[1:])}] = {_levers_after()} AS same_levers
FROM health_core AS c JOIN health_rows AS n ON n.number = c.number AND n.step = c.step + 1
WHERE c.op = 'GERMINATE' AND c.executed
"""  # noqa: S608 - constants alone

_CHANGES = """
CREATE OR REPLACE TEMP TABLE health_changes AS
SELECT m.* EXCLUDE (stages, next_stages), slot, (stages >> (4 * slot)) & 15 AS stage,
    (next_stages >> (4 * slot)) & 15 AS next_stage,
    CASE WHEN executed AND op <> 'WAIT' AND action_slot = slot THEN op END AS cause, b.same_levers
FROM health_moves AS m CROSS JOIN (SELECT range::INTEGER AS slot FROM range({slots}))
LEFT JOIN health_births AS b ON b.number = m.number AND b.step = m.step
WHERE stage <> next_stage OR cause IS NOT NULL
"""

_PRUNED = tuple((stage, after) for stage in sorted(LIVE_STAGES) for after in (Stage.PRUNED, Stage.EMBARGOED))
"""PRUNED lasts one epoch, so the next row may already show EMBARGOED."""

Pairs = tuple[tuple[Stage, Stage], ...]


def caused_by(asks: bool) -> dict[Op, Pairs]:
    """Return what each op makes of its slot by the next row.

    Args:
        asks: Every gate waits for an ADVANCE; else G1 starts TRAINING within the step that germinates, and G3 opens
            by itself.
    """
    blend = (Stage.TRAINING, Stage.BLENDING)
    start, hold = (Stage.GERMINATED, Stage.TRAINING), (Stage.BLENDING, Stage.HOLDING)
    return {
        Op.GERMINATE: ((Stage.DORMANT, Stage.GERMINATED if asks else Stage.TRAINING),),
        Op.ADVANCE: (start, blend, hold) if asks else (blend,),
        Op.FOSSILIZE: ((Stage.HOLDING, Stage.FOSSILIZED),),
        Op.PRUNE: _PRUNED,
    }


def one_step_relation(asks: bool = False) -> set[tuple[Stage, Stage]]:
    """Return the changes of a slot that one step can bring: the table's, and pairs of which the first is instant."""
    relation = {(before, after) for before, allowed in LEGAL_TRANSITIONS.items() for after in allowed}
    if not asks:
        relation = relation - {(Stage.DORMANT, Stage.GERMINATED)} | {(Stage.DORMANT, Stage.TRAINING)}
    if COOLDOWN_EPOCHS[Stage.PRUNED] == 1:
        relation |= {(stage, Stage.EMBARGOED) for stage in LIVE_STAGES}
    return relation


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the working tables and views (`health_*`) on a connection that has `steps` and `episodes`."""
    for statement in (_EPISODES, _ROWS, _CORE, _SEQUENCE, _MOVES, _BIRTHS, _CHANGES.format(slots=MAX_SLOTS)):
        connection.execute(statement)
    connection.execute("CREATE OR REPLACE TEMP TABLE health_legal (asks BOOLEAN, stage INTEGER, next_stage INTEGER)")
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE health_caused (asks BOOLEAN, op VARCHAR, stage INTEGER, next_stage INTEGER)"
    )
    legal, caused = [], []
    for asks in (False, True):
        legal += [[asks, int(before), int(after)] for before, after in sorted(one_step_relation(asks))]
        caused += [
            [asks, op.name, int(before), int(after)] for op, pairs in caused_by(asks).items() for before, after in pairs
        ]
    connection.executemany("INSERT INTO health_legal VALUES (?, ?, ?)", legal)
    connection.executemany("INSERT INTO health_caused VALUES (?, ?, ?, ?)", caused)
