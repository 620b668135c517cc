from __future__ import annotations

import hashlib
import time

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.catalogue import connect, query, view_columns
from esper.karn.sql_session import SqlSession
from esper.karn.store import open_store
from esper.leyline.actions import BLENDS, CNN_BLUEPRINTS, DWELL_EPOCHS, ISOLATIONS, SEED_LR_FACTORS, TEMPO_EPOCHS
from esper.leyline.errors import IntegrityError, QueryError
from esper.leyline.schema import SCHEMAS
from esper.leyline.stages import LIVE_STAGES, Stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tables = concat_tables(
        synthetic_tables(horizon=10, behaviours=("baseline", "random", "anti-kasmina", "schedule-sampler")),
        synthetic_tables(environment="digits-baseline", num_env_seeds=1),
    )
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(tables)
    return dataset.seal(matrix_id="m", provenance={}), tables


@pytest.fixture(scope="module")
def version(made):
    return made[0]


@pytest.fixture(scope="module")
def session(version):
    """What `esper sql` runs the statements of people in."""
    with SqlSession(version) as opened:
        yield opened


def frame(version, sql):
    return pl.from_arrow(query(version, sql))


def test_the_base_views_hold_the_version_with_the_schema_in_order(version):
    for name, schema in SCHEMAS.items():
        order = ", ".join(key for key in ("env_seed", "episode_id", "step") if key in schema.names)
        rows = query(version, f"SELECT * FROM {name} ORDER BY {order}")
        assert rows.column_names == schema.names
        assert rows.cast(schema).equals(version.table(name)), name


def test_the_views_are_those_of_the_design(version):
    connection = connect(version)
    try:
        assert set(view_columns(connection)) == {
            "steps", "episodes", "costs", "decisions", "decision_rewards", "cells", "returns", "returns_by_reward",
            "rewards", "lineages", "progress", "episode_costs", "cell_costs",
        }  # fmt: skip
    finally:
        connection.close()


def test_decisions_join_each_row_with_the_next(made):
    version, tables = made
    rows = frame(version, "SELECT * FROM decisions ORDER BY episode_id, step")
    steps = pl.from_arrow(tables["steps"]).sort("episode_id", "step")
    for column in ("host_key", "state_id", "val_accuracy", "seed_params"):
        expected = steps.with_columns(pl.col(column).shift(-1).over("episode_id").alias("next"))
        expected = expected.filter(~pl.col("is_last"))
        assert rows[f"next_{column}"].to_list() == expected["next"].to_list(), column


def test_decisions_spell_actions_in_words(made):
    version, tables = made
    rows = frame(version, "SELECT * FROM decisions WHERE op = 'GERMINATE' ORDER BY episode_id, step")
    steps = pl.from_arrow(tables["steps"]).filter(pl.col("op") == "GERMINATE").sort("episode_id", "step")
    levers = {
        "blueprint": CNN_BLUEPRINTS,
        "blend": [str(blend) for blend in BLENDS],
        "isolation": [str(kind) for kind in ISOLATIONS],
        "tempo_epochs": TEMPO_EPOCHS,
        "dwell_epochs": DWELL_EPOCHS,
        "seed_lr_factor": SEED_LR_FACTORS,
    }
    stored = dict.fromkeys(("blueprint", "blend", "isolation")) | {
        "tempo_epochs": "tempo", "dwell_epochs": "dwell", "seed_lr_factor": "seed_lr",
    }  # fmt: skip
    for name, words in levers.items():
        codes = steps[f"action_{stored[name] or name}"].to_list()
        assert rows[name].to_list() == [words[code] for code in codes], name
    assert set(rows["slot_stage"]) == {"DORMANT"}


def test_decisions_name_the_stage_and_blueprint_of_the_acted_slot_and_of_the_furthest_live_seed(made):
    version, tables = made
    rows = frame(version, "SELECT live_stage, slot, slot_stage, blueprint, op FROM decisions ORDER BY episode_id, step")
    steps = pl.from_arrow(tables["steps"]).filter(~pl.col("is_last")).sort("episode_id", "step")
    for found, row in zip(rows.to_dicts(), steps.to_dicts(), strict=True):
        stages = [Stage(row[f"s{slot}_stage"]) for slot in range(6)]
        live = [stage for stage in stages if stage in LIVE_STAGES]
        assert found["live_stage"] == (max(live).name if live else "NO LIVE SEED")
        if row["op"] == "WAIT":
            assert found["slot"] is found["slot_stage"] is found["blueprint"] is None
            continue
        assert found["slot_stage"] == stages[row["action_slot"]].name
        if row["op"] != "GERMINATE":
            assert found["blueprint"] == CNN_BLUEPRINTS[row[f"s{row['action_slot']}_blueprint"]]


def test_returns_are_the_sums_of_the_components_and_telescope_to_the_gain(made):
    version, tables = made
    rows = frame(version, "SELECT * FROM returns")
    steps = pl.from_arrow(tables["steps"])
    sums = steps.group_by("episode_id").agg(pl.sum("reward_accuracy_points"), pl.sum("reward_growth_log2"))
    both = rows.join(sums, on="episode_id")
    assert both.height == tables["episodes"].num_rows
    for found, expected in (
        ("accuracy_points", "reward_accuracy_points"),
        ("growth_log2", "reward_growth_log2"),
        ("gain_points", "reward_accuracy_points"),
    ):
        assert (both[found] - both[expected]).abs().max() < 1e-9
    assert (both["growth_log2"] - both["growth_factor"].log(2)).abs().max() < 1e-9


def test_cells_count_and_average_their_episodes(made):
    version, tables = made
    rows = frame(version, "SELECT * FROM cells ORDER BY environment, controller, epsilon")
    episodes = pl.from_arrow(tables["episodes"]).with_columns(
        gain=100 * (pl.col("final_val_accuracy") - pl.col("control_final_val_accuracy"))
    )
    expected = (
        episodes.group_by("environment", "controller", "epsilon")
        .agg(
            pl.len(),
            pl.col("env_seed").n_unique().alias("seeds"),
            pl.struct("env_seed", "history_id").n_unique().alias("histories"),
            pl.mean("gain"),
        )
        .sort("environment", "controller", "epsilon")
    )
    assert rows["episodes"].to_list() == rows["completed"].to_list() == expected["len"].to_list()
    assert rows["env_seeds"].to_list() == expected["seeds"].to_list()
    assert rows["distinct_histories"].to_list() == expected["histories"].to_list()
    assert (rows["mean_gain_points"] - expected["gain"]).abs().max() < 1e-9
    assert set(rows["failed"]) == set(rows["diverged"]) == {0}


def test_lineages_count_the_episodes_that_ride_them(made):
    version, tables = made
    rows = frame(version, "SELECT * FROM lineages ORDER BY env_seed, host_key")
    steps = pl.from_arrow(tables["steps"])
    expected = (
        steps.group_by("env_seed", "host_key")
        .agg(pl.col("episode_id").n_unique().alias("riders"), pl.min("step"), pl.len())
        .sort("env_seed", "host_key")
    )
    assert rows["riders"].to_list() == expected["riders"].to_list()
    assert rows["first_step"].to_list() == expected["step"].to_list()
    assert rows["num_rows"].to_list() == expected["len"].to_list()


@pytest.fixture
def other_file(tmp_path):
    path = tmp_path / "other.parquet"
    pa.parquet.write_table(pa.table({"a": [1]}), path)
    return path


def hashes(version):
    files = sorted(path for path in version.root.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ATTACKS = [
    "COPY episodes TO '{out}'",
    "COPY (SELECT 1) TO '{out}'",
    "EXPLAIN ANALYZE COPY episodes TO '{out}'",
    "EXPLAIN (ANALYZE, FORMAT json) COPY episodes TO '{out}'",
    "WITH x AS (COPY episodes TO '{own}' (FORMAT csv, USE_TMP_FILE false)) SELECT * FROM x",
    "WITH x AS MATERIALIZED (/* c */ COPY episodes TO '{out}') SELECT * FROM x",
    "WITH x AS (WITH y AS (SELECT 1) cOpY episodes TO '{own}') SELECT * FROM x",
    "WITH x AS (DELETE FROM _attempts RETURNING *) SELECT * FROM x",
    "EXPLAIN ANALYZE DELETE FROM _attempts",
    "ATTACH '{out}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA database_list",
    "SET enable_external_access = true",
    "SET memory_limit = '1TB'",
    "RESET lock_configuration",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_parquet('{other}')",
    "SELECT * FROM '{other}'",
    "SELECT * FROM read_parquet('https://example.com/a.parquet')",
    "DROP VIEW steps",
    "DROP TABLE _attempts",
    "CREATE TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW steps AS SELECT 1",
    "INSERT INTO _attempts VALUES ('a', 1, 'b')",
    "UPDATE _attempts SET attempt = 9",
    "DELETE FROM _attempts",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "EXPORT DATABASE '{out}'",
    "PREPARE p AS SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW steps",
    "SELECT * FROM query('COPY episodes TO ''{out}''')",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('steps')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "EXECUTE p",
    "DEALLOCATE p",
    "SELECT getenv('HOME')",
    "SELECT current_setting('memory_limit')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM enable_profiling(save_location := '{out}')",
    "SELECT * FROM enable_logging(storage := 'file', storage_path := '{out}')",
    "SELECT * FROM arrow_scan(1, 1, 1)",
    "SELECT * FROM read_json('/etc/passwd')",
    "SELECT * FROM parquet_metadata('{other}')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM \"READ_TEXT\" /* c */ ('/etc/passwd')",
    "SELECT * FROM system.main.read_text(['/etc/passwd'])",
    "SELECT * FROM rеad_text('/etc/passwd')",
    "SELECT * FROM ｒｅａｄ_ｔｅｘｔ('/etc/passwd')",
    "SELECT * FROM read_text\u00a0('/etc/passwd')",
    "SELECT * FROM read_text($$/etc/passwd$$)",
    "SELECT * FROM read_parquet('{link}')",
    "SELECT * FROM '{link}'",
    "SELECT * FROM glob('{link}')",
    "DESCRIBE '/etc/passwd'",
    "SUMMARIZE '{other}'",
    "SELECT 1; -- c\n COPY episodes TO '{out}'",
    "SELECT 1 /* ; */ ; /* SELECT 2 */ DROP VIEW steps",
    "CREATE MACRO m() AS 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "WITH x AS (INSERT INTO _attempts VALUES ('a', 1, 'b') RETURNING *) SELECT * FROM x",
    "WITH x AS (SELECT 1) UPDATE _attempts SET attempt = 9",
    "ALTER VIEW steps RENAME TO s",
    "SET VARIABLE x = 1",
    "USE memory",
    "IMPORT DATABASE '{out}'",
    "SELECT * FROM force_checkpoint()",
    "SELECT ?",
    "BEGIN TRANSACTION",
    "ROLLBACK",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_but_reading_this_version_is_possible(version, session, other_file, tmp_path, attack):
    own = version.files("episodes")[0]
    before, out, link = hashes(version), tmp_path / "out.csv", tmp_path / "link.parquet"
    link.symlink_to(other_file)
    with pytest.raises(QueryError) as caught:
        session.run(attack.format(out=out, own=own, other=other_file, link=link))
    assert "root:" not in str(caught.value)
    assert hashes(version) == before
    assert not out.exists()
    assert session.run("SELECT count(*) AS n FROM episodes")["n"][0].as_py() == version.manifest.counts["episodes"]


@pytest.mark.parametrize(
    "sql",
    [
        "SET memory_limit = '1TB'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "DELETE FROM _attempts",
        "COPY costs TO '{}'",
    ],
)
def test_the_connection_itself_is_locked(version, tmp_path, sql):
    """The second line of defence: without any check of the statement."""
    connection = connect(version)
    try:
        with pytest.raises(duckdb.Error):
            connection.execute(sql.format(tmp_path / "out"))
    finally:
        connection.close()
    assert list(tmp_path.iterdir()) == []


def test_python_variables_are_not_tables(version):
    secret = pa.table({"a": [1]})
    with pytest.raises(QueryError, match="unknown table 'secret'"):
        query(version, "SELECT * FROM secret")
    assert secret.num_rows == 1


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "WITH x AS (SELECT 1 AS a) SELECT * FROM x",
        "FROM cells",
        "DESCRIBE decisions",
        "SUMMARIZE costs",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM steps",
        "EXPLAIN ANALYZE SELECT count(*) FROM steps",
        "SELECT 'COPY steps TO x; DROP VIEW steps' AS a -- delete",
        'SELECT 1 AS "copy" /* update */;',
        "SELECT 1 AS glob, 2 AS summary FROM range(3) AS query",
        "SELECT * FROM generate_series(1, 3), unnest([1, 2])",
        "SELECT $$ read_text('/etc/passwd') $$",
        "SELECT * EXCLUDE (tree_mask) FROM steps LIMIT 1",
    ],
)
def test_every_way_of_reading_works(session, sql):
    assert session.run(sql).num_columns >= 1


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT val_acuracy FROM steps", "unknown column 'val_acuracy'; did you mean 'val_accuracy'"),
        ("SELECT s.contoller FROM episodes s", "unknown column 'contoller'; did you mean 'controller'"),
        ("SELECT * FROM episode", "unknown table 'episode'; did you mean 'episodes'"),
        ("SELECT stps.op FROM steps", "unknown table 'stps'; did you mean 'steps'"),
        ("SELECT summ(env_seed) FROM episodes", "unknown function 'summ'; did you mean 'sum'"),
        ("WITH t AS (SELECT 1 AS alone) SELECT alonne FROM t", "unknown column 'alonne'; did you mean 'alone'"),
        ("SELECT * FROM read_text('x')", "function 'read_text' is not allowed"),
        ("SELEC 1", "not valid SQL"),
        ("SELECT 'x'::INT", "Could not convert"),
    ],
)
def test_mistakes_are_explained(session, sql, message):
    with pytest.raises(QueryError, match=message):
        session.run(sql)


def test_a_query_that_takes_too_long_is_interrupted(version):
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0.3 s"):
        query(version, "SELECT count(*) FROM range(10000000) a, range(10000000) b", timeout_s=0.3)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("table", ["steps", "episodes"])
def test_a_damaged_file_is_an_integrity_error(tmp_path, table):
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=1))
    version = dataset.seal(matrix_id="m", provenance={})
    path = version.files(table)[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(IntegrityError, match="demo@1"):
        query(version, f"SELECT * FROM {table}")
    path.write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=path.name):
        query(version, f"SELECT * FROM {table}")
