"""Tables on their way into and out of the store: checked, sorted, and cast between the schema and its storage types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.errors import SchemaError, nearest, unknown_name
from esper.leyline.keys import hex_digest
from esper.leyline.schema import OUTCOMES, SCHEMAS

COMMIT_COLUMNS = ("commit_id", "attempt")
SORT_COLUMNS = ("env_seed", "episode_id", "step", "actor")
PARTITION_COLUMN = "environment"


def _storage_type(kind: pa.DataType) -> pa.DataType:
    """Delta Lake has no unsigned integers: the next wider signed one holds them."""
    if pa.types.is_uint8(kind):
        return pa.int16()
    if pa.types.is_uint16(kind):
        return pa.int32()
    if pa.types.is_list(kind):
        return pa.list_(_storage_type(kind.value_type))
    return kind


def storage_schema(table: str) -> pa.Schema:
    """Return the schema of a table's Parquet files, the partition column included."""
    return pa.schema([field.with_type(_storage_type(field.type)) for field in SCHEMAS[table]])


def check_tables(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Return the three tables in schema order and with schema types, without the commit columns.

    Raises:
        SchemaError: A table or column is missing, unknown, of another type, null where it must not be or not finite;
            rows of an episode that `episodes` does not name; a key that appears twice.
    """
    if set(tables) != set(SCHEMAS):
        raise SchemaError(f"a commit has the tables {sorted(tables)}\n  expected: {sorted(SCHEMAS)}")
    checked = {name: _check_table(name, tables[name]) for name in SCHEMAS}
    episodes = checked["episodes"]["episode_id"]
    if pc.count_distinct(episodes).as_py() != len(episodes):
        raise SchemaError("an episode_id appears twice in `episodes`\n  expected: one row per episode")
    for name in ("steps", "costs"):
        _check_rows(name, checked[name], episodes)
    unknown = set(pc.unique(checked["episodes"]["outcome"]).to_pylist()) - set(OUTCOMES)
    if unknown:
        raise SchemaError(f"outcome {sorted(unknown)[0]!r} in `episodes`\n  expected: one of {', '.join(OUTCOMES)}")
    return checked


def _check_table(name: str, table: pa.Table) -> pa.Table:
    fields = [field for field in SCHEMAS[name] if field.name not in COMMIT_COLUMNS]
    wanted = {field.name for field in fields}
    for column in table.column_names:
        if column not in wanted:
            close = nearest(column, wanted)
            hint = f"; did you mean {close!r}?" if close else ""
            raise SchemaError(f"table {name!r} has an unknown column {column!r}{hint}\n  expected: leyline.schema")
    arrays, given = [], set(table.column_names)
    for field in fields:
        if field.name not in given:
            close = nearest(field.name, given)
            hint = f" (nearest: {close!r})" if close else ""
            raise SchemaError(f"table {name!r} lacks the column {field.name!r}{hint}\n  expected: {field.type}")
        arrays.append(_check_array(name, field, table[field.name]))
    return pa.table(arrays, schema=pa.schema(fields))


def _check_array(table: str, field: pa.Field, array: pa.ChunkedArray) -> pa.ChunkedArray:
    where = f"column {field.name!r} of {table!r}"
    try:
        array = array.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SchemaError(f"{where} is {array.type}\n  expected: {field.type} ({reason})") from None
    if not field.nullable and array.null_count:
        raise SchemaError(f"{where} has {array.null_count} nulls\n  expected: a value in every row")
    if pa.types.is_floating(field.type) and pc.all(pc.is_finite(array)).as_py() is False:
        raise SchemaError(f"{where} has a value that is not finite\n  expected: null where nothing was measured")
    return array


def _check_rows(name: str, table: pa.Table, episodes: pa.ChunkedArray) -> None:
    strangers = table.filter(pc.invert(pc.is_in(table["episode_id"], episodes.combine_chunks())))
    if strangers.num_rows:
        first = strangers["episode_id"][0].as_py()
        raise SchemaError(f"{name!r} has rows of episode {first!r}\n  expected: episodes that `episodes` names")
    keys = [column for column in ("episode_id", "step", "actor") if column in table.column_names]
    distinct = table.group_by(keys, use_threads=False).aggregate([]).num_rows
    if distinct != table.num_rows:
        raise SchemaError(f"{name!r} has {table.num_rows - distinct} repeated rows\n  key: {', '.join(keys)}")


def commit_identity(episode_ids: Sequence[str]) -> str:
    """Return the id of a commit, the hash of the sorted ids of its episodes."""
    return hex_digest(sorted(episode_ids), 24)


def to_storage(name: str, table: pa.Table, commit_id: str, attempt: int) -> pa.Table:
    """Return the sorted rows with their commit columns, in storage types."""
    table = sort_rows(table)
    table = table.append_column("commit_id", pa.array([commit_id] * len(table), pa.string()))
    table = table.append_column("attempt", pa.array([attempt] * len(table), pa.int32()))
    return table.cast(storage_schema(name))


def from_storage(name: str, table: pa.Table) -> pa.Table:
    """Return rows as read from the store with the schema's types, columns as they are."""
    schema = SCHEMAS[name]
    return table.cast(pa.schema([schema.field(column) for column in table.column_names]))


def sort_rows(table: pa.Table) -> pa.Table:
    """Return the rows sorted by (env_seed, episode_id, step, actor), as far as the table has these columns."""
    keys = [(column, "ascending") for column in SORT_COLUMNS if column in table.column_names]
    return table.sort_by(keys).combine_chunks() if table.num_rows else table


def last_attempts(episodes: pa.Table) -> pa.Table:
    """Return one row per episode: that of its last attempt (of equal attempts, the greatest commit_id).

    Two processes that ran the same episode at the same time both commit it; equal specs make equal rows.
    """
    order = episodes.sort_by([("episode_id", "ascending"), ("attempt", "descending"), ("commit_id", "descending")])
    ids = order["episode_id"].combine_chunks()
    if len(ids) < 2:
        return order
    first = pc.fill_null(pc.not_equal(ids[1:], ids[:-1]), fill_value=True)
    return order.filter(pa.concat_arrays([pa.array([True]), first]))


def attempt_keys(table: pa.Table) -> pa.Array:
    """Return the (episode_id, attempt, commit_id) of each row as one string."""
    parts = [table["episode_id"], table["attempt"].cast(pa.string()), table["commit_id"]]
    return pc.binary_join_element_wise(*(part.combine_chunks() for part in parts), "/")


def check_columns_or_all(table: str, columns: Sequence[str] | None) -> list[str]:
    """Return the columns asked for, all of the schema's where None; UnknownNameError for an unknown table or column."""
    if table not in SCHEMAS:
        raise unknown_name("table", table, SCHEMAS)
    known = SCHEMAS[table].names
    for column in columns or ():
        if column not in known:
            raise unknown_name(f"column of {table}", column, known)
    return list(known if columns is None else columns)
