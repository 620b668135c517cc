"""The digest of a dataset: SHA-256 over its deterministic columns, the same for any chunking, encoding and layout.

Per episode the rows of `steps`, sorted by step, and its row of `episodes` are hashed; the dataset's digest is the hash
of (episode_id, episode digest) in order of episode_id. So it can be computed episode by episode, in any order.

The columns are those of the schema version under which the dataset was sealed, so an older digest stays what it was.
Encoding of a block of rows: a header (column names and types), then the fixed-width columns row by row (one validity
byte and the little-endian value, zero where null), then per variable-width column the lengths (int64, -1 where null)
and the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.keys import canonical_json
from esper.leyline.schema import SCHEMA_VERSION, SCHEMAS, deterministic_columns

Bytes = NDArray[np.uint8]


class _Variable:
    """A string, binary or list column as lengths [N] and one run of bytes."""

    def __init__(self, array: pa.Array) -> None:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_list(array.type):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
            rows = _fixed(pc.list_flatten(array))
            self.data = rows.tobytes()
            width = rows.shape[1]
        else:
            binary = pc.fill_null(array.cast(pa.large_binary()), b"")
            lengths = pc.binary_length(binary).to_numpy().astype(np.int64)
            self.data = b"".join(binary.to_pylist())
            width = 1
        self.lengths = np.where(valid, lengths, -1).astype("<i8")
        self.offsets = np.concatenate(([0], np.cumsum(lengths))) * width

    def block(self, low: int, high: int) -> bytes:
        return self.lengths[low:high].tobytes() + self.data[self.offsets[low] : self.offsets[high]]


def _fixed(array: pa.Array) -> Bytes:
    """One validity byte and the value of each row, uint8 [N, 1 + width]."""
    valid = array.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8)
    if pa.types.is_boolean(array.type):
        values = pc.fill_null(array, fill_value=False).to_numpy(zero_copy_only=False).astype(np.uint8)
    else:
        values = pc.fill_null(array, pa.scalar(0, array.type)).to_numpy(zero_copy_only=False)
    little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<")))
    rows = little.view(np.uint8).reshape(len(valid), little.itemsize)
    return np.concatenate([valid[:, None], rows], axis=1)


def _is_variable(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_list(kind))


def _header(table: str, names: Sequence[str]) -> bytes:
    schema = SCHEMAS[table]
    columns = [[name, str(schema.field(name).type)] for name in names]
    return canonical_json([table, columns]).encode()


def episode_digests(table: str, rows: pa.Table, schema_version: int = SCHEMA_VERSION) -> dict[str, bytes]:
    """Return the SHA-256 of each episode's rows.

    Args:
        table: `steps` or `episodes`.
        rows: Whole episodes with schema types; all rows of an episode adjacent, in order of step.
        schema_version: Which columns count.
    """
    if not rows.num_rows:
        return {}
    schema = SCHEMAS[table]
    names = deterministic_columns(table, schema_version)
    arrays = {name: rows[name].combine_chunks() for name in names}
    fixed = np.concatenate([_fixed(array) for name, array in arrays.items() if not _is_variable(array.type)], axis=1)
    variable = [_Variable(array) for name, array in arrays.items() if _is_variable(schema.field(name).type)]
    ids = np.asarray(arrays["episode_id"].to_pylist())
    starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1]))).tolist()
    header = _header(table, names)
    digests = {}
    for low, high in zip(starts, [*starts[1:], len(ids)]):
        digest = hashlib.sha256(header)
        digest.update((high - low).to_bytes(8, "little"))
        digest.update(fixed[low:high].tobytes())
        for column in variable:
            digest.update(column.block(low, high))
        digests[str(ids[low])] = digest.digest()
    return digests


def dataset_digest(episodes: pa.Table, steps: Iterable[pa.Table], schema_version: int = SCHEMA_VERSION) -> str:
    """Return the digest of a dataset, 64 hex digits.

    Args:
        episodes: One row per episode.
        steps: Blocks of whole episodes as `episode_digests` wants them.
        schema_version: Which columns count.
    """
    outcomes = episode_digests("episodes", episodes.sort_by("episode_id"), schema_version)
    histories: dict[str, bytes] = {}
    for block in steps:
        histories |= episode_digests("steps", block, schema_version)
    total = hashlib.sha256()
    for episode_id in sorted(outcomes):
        total.update(episode_id.encode() + b"\0" + outcomes[episode_id] + histories.get(episode_id, b""))
    return total.hexdigest()
