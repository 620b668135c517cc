from __future__ import annotations

import pyarrow as pa
import pytest
from factories import synthetic_tables

from esper.karn.digest import dataset_digest, episode_digests
from esper.karn.tables import check_tables, from_storage, sort_rows, to_storage
from esper.leyline.schema import SCHEMAS, deterministic_columns


@pytest.fixture(scope="module")
def tables():
    made = check_tables(synthetic_tables(num_env_seeds=1, epsilons=(0.2,), horizon=3))
    return {name: sort_rows(table) for name, table in made.items()}


def digest(tables):
    return dataset_digest(tables["episodes"], [tables["steps"]])


def with_column(tables, table, column, values):
    index = tables[table].column_names.index(column)
    field = tables[table].schema.field(index)
    return tables | {table: tables[table].set_column(index, field, pa.array(values, field.type))}


def test_the_digest_is_64_hex_digits_and_the_same_twice(tables):
    assert len(digest(tables)) == 64
    assert digest(tables) == digest(tables)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_the_digest_does_not_depend_on_chunking(tables, rows):
    chunked = {name: pa.Table.from_batches(table.to_batches(rows)) for name, table in tables.items()}
    assert digest(chunked) == digest(tables)


def test_the_digest_does_not_depend_on_how_blocks_are_cut(tables):
    steps = tables["steps"]
    rows = steps.num_rows // tables["episodes"].num_rows
    blocks = [steps.slice(start, rows) for start in range(0, steps.num_rows, rows)]
    assert dataset_digest(tables["episodes"], reversed(blocks)) == digest(tables)


def test_storage_types_and_back_do_not_change_the_digest(tables):
    stored = {
        name: from_storage(name, to_storage(name, table, "c", 1)).drop_columns(["commit_id", "attempt"])
        for name, table in tables.items()
    }
    assert digest(stored) == digest(tables)


@pytest.mark.parametrize("table", ["steps", "episodes"])
def test_every_deterministic_column_counts(tables, table):
    """One other value in the first row changes the digest, whichever column it is in."""
    before = digest(tables)
    for column in deterministic_columns(table):
        if column == "episode_id":
            continue
        values = tables[table][column].to_pylist()
        other = other_value(values[0], tables[table].schema.field(column).type)
        assert digest(with_column(tables, table, column, [other, *values[1:]])) != before, column


def other_value(value, kind):
    if pa.types.is_boolean(kind):
        return not value
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return 1 if value is None else value + 1
    if pa.types.is_list(kind):
        return [1] if value is None else value[:-1]
    return (b"x" if pa.types.is_binary(kind) else "x") + (value or type(value or "")())


@pytest.mark.parametrize(
    ("column", "first", "second"),
    [("val_loss", None, 0.0), ("val_loss", 0.0, -0.0), ("op", "", None), ("op_probs", [], None), ("plan", 0, None)],
)
def test_null_zero_and_empty_are_different(tables, column, first, second):
    values = tables["steps"][column].to_pylist()
    digests = {digest(with_column(tables, "steps", column, [value, *values[1:]])) for value in (first, second)}
    assert len(digests) == 2


def test_values_cannot_move_between_neighbouring_rows_or_columns(tables):
    first = with_column(tables, "steps", "actor", ["ab", "c", *tables["steps"]["actor"].to_pylist()[2:]])
    second = with_column(tables, "steps", "actor", ["a", "bc", *tables["steps"]["actor"].to_pylist()[2:]])
    assert digest(first) != digest(second)


def test_code_commit_and_time_are_not_in_the_digest(tables):
    other = with_column(tables, "episodes", "code_commit", ["other"] * tables["episodes"].num_rows)
    assert digest(other) == digest(tables)


def test_an_episode_without_steps_counts(tables):
    without = tables["steps"].slice(0, 0)
    assert dataset_digest(tables["episodes"], [without]) != dataset_digest(tables["episodes"].slice(1), [without])
    assert episode_digests("steps", without) == {}


def test_an_empty_column_of_lists_and_strings_is_encoded():
    made = check_tables(synthetic_tables(num_env_seeds=1, behaviours=("schedule-sampler",)))
    assert made["steps"]["op_probs"].null_count == made["steps"].num_rows
    assert len(digest({name: sort_rows(made[name]) for name in SCHEMAS})) == 64
