"""The working tables of the checks, made once per connection: which episodes are sound, and what each decision changed.

A structurally broken episode is the business of `structure` and `duplicates` alone; every later check reads the sound
ones, so that one fault does not set off unrelated alarms.
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
        any_value(branch_parent) AS branch_parent, max(num_steps) AS num_steps, count(*) AS copies,
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
SELECT *, NOT failed AND NOT doubled AND NOT broken AND num_rows = num_distinct AS sound FROM joined
"""

# Views are temporary: a catalogue's connection cannot write to its own database.
_ROWS = """
CREATE OR REPLACE TEMP VIEW health_rows AS
SELECT s.*, e.outcome, e.root, e.has_patience, e.kind
FROM steps AS s JOIN health_episodes AS e USING (episode_id) WHERE e.sound
"""

_OBSERVED = "CREATE OR REPLACE TEMP VIEW health_observed AS SELECT {columns} FROM health_rows"

_SEQUENCE = "CREATE OR REPLACE TEMP VIEW health_sequence AS SELECT * FROM health_observed WHERE NOT is_last"

_MOVES = """
CREATE OR REPLACE TEMP TABLE health_moves AS
SELECT * FROM health_sequence
WHERE stages IS DISTINCT FROM next_stages OR host_key <> next_host_key OR (executed AND op <> 'WAIT')
"""

_CHANGES = """
CREATE OR REPLACE TEMP TABLE health_changes AS
SELECT * EXCLUDE (stages, next_stages, levers, next_levers),
    slot, stages[slot + 1] AS stage, next_stages[slot + 1] AS next_stage,
    CASE WHEN executed AND op <> 'WAIT' AND action_slot = slot THEN op END AS cause,
    levers = next_levers[slot + 1] AS same_levers
FROM health_moves, range({slots}) AS slots(slot)
WHERE stage IS DISTINCT FROM next_stage OR cause IS NOT NULL
"""

CAUSED: dict[Op, tuple[tuple[Stage, Stage], ...]] = {
    Op.GERMINATE: ((Stage.DORMANT, Stage.GERMINATED), (Stage.DORMANT, Stage.TRAINING)),
    Op.ADVANCE: ((Stage.TRAINING, Stage.BLENDING),),
    Op.FOSSILIZE: ((Stage.HOLDING, Stage.FOSSILIZED),),
    Op.PRUNE: tuple((stage, after) for stage in sorted(LIVE_STAGES) for after in (Stage.PRUNED, Stage.EMBARGOED)),
}
"""What each op makes of its slot by the next row. G1 starts TRAINING within the step that germinates; PRUNED lasts one
epoch, so the next row may already show EMBARGOED."""


def one_step_relation() -> set[tuple[Stage, Stage]]:
    """Return the changes of a slot that one step can bring: the table's, and pairs of which the first is instant."""
    table = {(before, after) for before, allowed in LEGAL_TRANSITIONS.items() for after in allowed}
    shortcuts = {(Stage.DORMANT, Stage.TRAINING)}
    if COOLDOWN_EPOCHS[Stage.PRUNED] == 1:
        shortcuts |= {(stage, Stage.EMBARGOED) for stage in LIVE_STAGES}
    return table | shortcuts


def slot_list(feature: str) -> str:
    """Return the SQL list of a feature over the slots."""
    return "[" + ", ".join(slot_column(slot, feature) for slot in range(MAX_SLOTS)) + "]"


def _lever_lists() -> str:
    per_slot = ("[" + ", ".join(slot_column(slot, lever) for lever in LEVERS) + "]" for slot in range(MAX_SLOTS))
    return "[" + ", ".join(per_slot) + "]"


def _sequence(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the views of sound rows, each beside the row that follows it."""
    after = "OVER (PARTITION BY episode_id ORDER BY step)"
    levers = "[" + ", ".join(f"{name}::INTEGER" for name in ACTION_FIELDS[1:]) + "]"
    blended = "[" + ", ".join(str(int(stage)) for stage in sorted(BLENDED_STAGES)) + "]"
    connection.execute(_ROWS)
    columns = (
        "episode_id, environment, step, is_last, op, action_slot, executed, host_key, outcome, root, has_patience, "
        "terminated, val_loss, control_val_loss, "
        f"first_value(host_key) {after} AS root_key, lead(host_key) {after} AS next_host_key, "
        f"{slot_list('stage')} AS stages, lead({slot_list('stage')}) {after} AS next_stages, "
        f"{levers} AS levers, lead({_lever_lists()}) {after} AS next_levers, "
        f"list_has_any({slot_list('stage')}, {blended}) AS blended"
    )
    connection.execute(_OBSERVED.format(columns=columns))
    connection.execute(_SEQUENCE)


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the working tables and views (`health_*`) on a connection that has `steps` and `episodes`."""
    connection.execute(_EPISODES)
    _sequence(connection)
    connection.execute(_MOVES)
    connection.execute(_CHANGES.format(slots=MAX_SLOTS))
    connection.execute("CREATE OR REPLACE TEMP TABLE health_legal (stage INTEGER, next_stage INTEGER)")
    connection.execute("CREATE OR REPLACE TEMP TABLE health_caused (op VARCHAR, stage INTEGER, next_stage INTEGER)")
    legal = [[int(before), int(after)] for before, after in sorted(one_step_relation())]
    caused = [[op.name, int(before), int(after)] for op, pairs in CAUSED.items() for before, after in pairs]
    connection.executemany("INSERT INTO health_legal VALUES (?, ?)", legal)
    connection.executemany("INSERT INTO health_caused VALUES (?, ?, ?)", caused)
