"""Datasets that an older schema wrote: read, checked, learned from and added to."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, Field
from deltalake.schema import PrimitiveType
from factories import Tables, synthetic_tables

from esper.karn.catalogue import query
from esper.karn.digest import dataset_digest
from esper.karn.store import Dataset, open_store
from esper.karn.versions import Version
from esper.leyline.errors import SchemaError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.schema import (
    ADDED_IN,
    OLDEST_SCHEMA,
    SCHEMA_VERSION,
    SCHEMAS,
    UPCASTERS,
    columns_under,
    deterministic_columns,
    schema_version_of,
    upcast,
)
from esper.leyline.verdict import Level
from esper.simic.batches import load_transitions
from esper.simic.bc import BcRecipe
from esper.simic.training import train
from esper.tamiyo.checkpoints import read_card
from esper.tamiyo.networks import NetworkSpec
from quality.checking import measure_all, stored_schema_problems
from quality.measures import Measure
from quality.suites import judge
from quality.thresholds import load_thresholds

DIGEST_OF_SCHEMA_1 = "4f7c7f794b4aacb34d8a9e99827615294118c7d8456102e0b8c58c78700c2373"
"""Of the made-up rows below, computed by the code that wrote schema 1."""

RULES = ("baseline", "random", "never-act", "aggressive")


def value(kind: pa.DataType, place: int) -> object:
    if pa.types.is_list(kind):
        return [value(kind.value_type, place), None]
    if pa.types.is_boolean(kind):
        return place % 2 == 0
    if pa.types.is_integer(kind):
        return place % 100
    if pa.types.is_floating(kind):
        return place / 8
    return bytes([place % 256]) if pa.types.is_binary(kind) else f"row {place}"


def made_up(table: str, schema_version: int, num_rows: int) -> pa.Table:
    """Rows of one episode, a third of whatever may be null is."""
    columns = {}
    for place, name in enumerate(columns_under(table, schema_version)):
        field = SCHEMAS[table].field(name)
        values: list[object] = [value(field.type, place + row) for row in range(num_rows)]
        values = [None if field.nullable and (place + row) % 3 == 0 else v for row, v in enumerate(values)]
        if name == "episode_id":
            values = ["episode"] * num_rows
        elif pa.types.is_timestamp(field.type):
            values = [None] * num_rows
        columns[name] = pa.array(values, field.type)
    return pa.table(columns)


def under_schema_1(tables: Tables) -> Tables:
    old = {name: columns_under(name, 1) for name in SCHEMAS}
    return {name: table.select([c for c in old[name] if c in table.column_names]) for name, table in tables.items()}


def seal(dataset: Dataset) -> Version:
    return dataset.seal(matrix_id="m", provenance={})


@pytest.fixture(scope="module")
def rows() -> Tables:
    return synthetic_tables(num_env_seeds=2, horizon=10, behaviours=RULES)


@pytest.fixture(scope="module")
def old(rows: Tables, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A sealed version of schema 1: what the store writes while the schema has no later column."""
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("old")
    with pytest.MonkeyPatch.context() as patch:
        for name, schema in dict(SCHEMAS).items():
            patch.setitem(SCHEMAS, name, pa.schema([schema.field(column) for column in columns_under(name, 1)]))
        patch.setattr("esper.karn.store.SCHEMA_VERSION", 1)
        dataset.commit(under_schema_1(rows))
        return seal(dataset)


def test_a_digest_of_schema_1_is_what_it_was() -> None:
    episodes, steps = made_up("episodes", 1, 1), made_up("steps", 1, 2)
    assert dataset_digest(episodes, [steps], 1) == DIGEST_OF_SCHEMA_1
    now = dataset_digest(made_up("episodes", 2, 1), [made_up("steps", 2, 2)])
    assert now != DIGEST_OF_SCHEMA_1


def test_what_a_schema_adds_is_nullable_and_the_version_of_rows_follows_from_their_columns() -> None:
    for table, added in ADDED_IN.items():
        first = columns_under(table, 1)
        assert set(first).isdisjoint(added)
        assert set(first) | set(added) == set(SCHEMAS[table].names)
        assert all(SCHEMAS[table].field(name).nullable for name in added)
        assert set(added.values()) <= set(range(2, SCHEMA_VERSION + 1))
        assert schema_version_of(table, first) == 1
        assert schema_version_of(table, SCHEMAS[table].names) == (SCHEMA_VERSION if added else 1)
    assert deterministic_columns("costs") == []


def test_columns_that_came_later_are_null_and_the_others_are_what_was_written(old: Version, rows: Tables) -> None:
    assert old.manifest.schema_version == 1
    for name, schema in SCHEMAS.items():
        found = old.table(name)
        assert found.schema.equals(schema)
        assert all(found[column].null_count == len(found) for column in ADDED_IN[name])
        assert len(found) == len(rows[name])
    assert pa.Table.from_batches(old.batches("steps", batch_rows=64)).equals(old.table("steps"))
    losses = old.table("steps", columns=["val_loss"])["val_loss"]
    assert pc.sum(losses).as_py() == pytest.approx(pc.sum(rows["steps"]["val_loss"]).as_py())


def test_rows_made_of_today_one_by_one_are_those_that_the_store_reads(old: Version, rows: Tables) -> None:
    assert sorted(UPCASTERS) == list(range(OLDEST_SCHEMA, SCHEMA_VERSION))
    for name, written in under_schema_1(rows).items():
        order = [
            (key, "ascending") for key in ("env_seed", "episode_id", "step", "actor") if key in written.schema.names
        ]
        now = upcast(name, written.sort_by(order), 1)
        assert now.column_names == [column for column in SCHEMAS[name].names if column not in ("commit_id", "attempt")]
        assert now.equals(old.table(name, columns=now.column_names).cast(now.schema))
        assert upcast(name, now, SCHEMA_VERSION).equals(now)
        for stranger in (OLDEST_SCHEMA - 1, SCHEMA_VERSION + 1):
            with pytest.raises(SchemaError, match=f"schema version {stranger}"):
                upcast(name, now, stranger)


def test_a_table_that_a_newer_esper_wrote_is_neither_added_to_nor_sealed(rows: Tables, tmp_path: Path) -> None:
    dataset = open_store(tmp_path).dataset("newer")
    dataset.commit(rows)
    episodes = DeltaTable(dataset.path / "episodes")
    episodes.alter.add_columns([Field("from_the_future", PrimitiveType("double"))])
    more = synthetic_tables(num_env_seeds=1, horizon=10, behaviours=RULES, first_replicate=2)
    for use in (lambda: dataset.commit(more), lambda: seal(dataset)):
        with pytest.raises(SchemaError, match=r"'from_the_future'\n.*update esper"):
            use()


def test_a_policy_is_trained_on_it(old: Version, tmp_path: Path) -> None:
    recipe = BcRecipe(network=NetworkSpec(hidden=16, slot_hidden=8), steps=4, batch_size=16, log_every=2)
    rewards = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
    options = {"rewards": rewards, "out": tmp_path / "p", "seed": 0, "override_health": "an old dataset"}
    losses: list[dict[str, float]] = []
    policy = train("bc", old, recipe=recipe, on_log=losses.append, **options)
    assert read_card(Path(policy.path)).metrics["training_rows"] > 0
    assert all(np.isfinite(value) for row in losses for value in row.values())


def test_it_still_verifies(old: Version) -> None:
    assert old.verify() == []


def test_sql_sees_the_later_columns_as_null(old: Version) -> None:
    found = query(old, "SELECT count(*) AS n, count(shapley) AS a, count(num_rollbacks) AS b FROM episodes").to_pylist()
    assert found == [{"n": len(old.table("episodes")), "a": 0, "b": 0}]
    counted = query(old, "SELECT count(s0_contribution_25) AS n, count(s0_alpha) AS known FROM steps").to_pylist()[0]
    assert counted["n"] == 0 < counted["known"]


def constants(measures: list[Measure]) -> str:
    return next(m.message for m in measures if m.check == "constant_features" and m.environment == "all")


def measured(tables: Tables) -> list[Measure]:
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return measure_all(connection)


def test_health_takes_an_old_version_for_what_it_is(old: Version, rows: Tables) -> None:
    assert stored_schema_problems(old) == []
    measures = measured({name: old.table(name) for name in ("steps", "episodes")})
    results = judge(measures, load_thresholds(), None)
    assert {r.level for r in results if r.name in ("schema", "finite_values", "required_values")} == {Level.PASS}
    told = constants(measures)
    assert not any(name.split("_", 1)[-1] in told for name in ADDED_IN["steps"])


def test_a_later_feature_without_any_value_is_told_in_rows_of_today(rows: Tables) -> None:
    steps = rows["steps"]
    place = steps.schema.get_field_index("host_weight_change")
    empty = steps.set_column(place, steps.schema.field(place), pa.nulls(len(steps), pa.float32()))
    assert "host_weight_change" in constants(measured({**rows, "steps": empty}))
    assert "host_weight_change" not in constants(measured(dict(rows)))


@pytest.mark.parametrize("view", ["v1", "v3", "v4"])
def test_learners_read_it(old: Version, view: str) -> None:
    reward = load("rewards", "digits-gap", RewardSpec)
    transitions = load_transitions(old, view, {"digits-gap": reward})
    assert len(transitions) > 0
    assert np.isfinite(transitions.obs_MV).all()


def test_a_dataset_of_schema_1_can_be_added_to_and_its_old_version_stays(rows: Tables, tmp_path: Path) -> None:
    dataset = open_store(tmp_path).dataset("grown")
    with pytest.MonkeyPatch.context() as patch:
        for name, schema in dict(SCHEMAS).items():
            patch.setitem(SCHEMAS, name, pa.schema([schema.field(column) for column in columns_under(name, 1)]))
        patch.setattr("esper.karn.store.SCHEMA_VERSION", 1)
        dataset.commit(under_schema_1(rows))
        first = seal(dataset)
    dataset.commit(synthetic_tables(num_env_seeds=1, horizon=10, behaviours=RULES, first_replicate=2))
    second = seal(dataset)
    assert (first.manifest.schema_version, second.manifest.schema_version) == (1, SCHEMA_VERSION)
    assert first.verify() == second.verify() == []
    assert stored_schema_problems(second) == []
    episodes = second.table("episodes", columns=["replicate", "num_rollbacks", "data_digest"]).to_pylist()
    assert {row["num_rollbacks"] for row in episodes if row["replicate"] < 2} == {None}
    assert {row["num_rollbacks"] for row in episodes if row["replicate"] == 2} == {0}
