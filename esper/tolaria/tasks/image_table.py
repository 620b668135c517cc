"""Parquet files of images in the layout of the Hugging Face hub: a column of file bytes, a column of labels."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from esper.leyline.errors import DataError
from esper.tolaria.tasks.decoding import Pixels, decode_image

Rows = NDArray[np.int64]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")
_LAYOUT = "img (struct of bytes and path, or bytes) and label (integer or text)"
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTable:
    """A Parquet file whose labels are read and whose images are not yet.

    Attributes:
        path: The file.
        labels: Class of each row, int64 [N].
        num_classes: Classes.
        image_column: The column of images.
    """

    path: Path
    labels: Rows
    num_classes: int
    image_column: str

    def __len__(self) -> int:
        return len(self.labels)


def open_table(path: Path, num_classes: int | None = None) -> ImageTable:
    """Read the labels of a file.

    Whole numbers are classes where their number is known (given, or named in the file's metadata), else the distinct
    labels in rising order are classes 0, 1, ...

    Raises:
        DataError: It is no Parquet file, lacks a column, or a label is missing, negative or out of range.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_column = _column(schema.names, IMAGE_COLUMNS, path)
            label_column = _column(schema.names, LABEL_COLUMNS, path)
            column = file.read(columns=[label_column])[label_column].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    if num_classes is None:
        num_classes = _declared_classes(schema, label_column)
    labels, found = _classes(column, num_classes, path)
    if found < 2 or len(np.unique(labels)) < 2:
        raise DataError(f"{path}: the {len(labels)} rows hold fewer than two classes\n  expected: at least two")
    return ImageTable(path=path, labels=labels, num_classes=found, image_column=image_column)


def decode_rows(table: ImageTable, rows: Rows, resolution: int, *, resize: bool) -> tuple[Pixels, str]:
    """Return images in the order of `rows`, uint8 [N, resolution, resolution, 3], and their commonest file format.

    Raises:
        DataError: A row holds no image, or one that cannot be decoded; the row is named.
    """
    pixels = np.empty((len(rows), resolution, resolution, 3), dtype=np.uint8)
    target = np.full(len(table), -1)
    target[rows] = np.arange(len(rows))
    formats: Counter[str] = Counter()
    start = 0
    try:
        with pq.ParquetFile(table.path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[table.image_column]):
                wanted = np.flatnonzero(target[start : start + len(batch)] >= 0)
                for offset, value in zip(wanted, batch.column(0).take(pa.array(wanted)).to_pylist()):
                    row = start + int(offset)
                    data, where = _file_bytes(value, row, table)
                    pixels[target[row]], kind = decode_image(data, where, resolution, resize=resize)
                    formats[kind] += 1
                start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table.path} cannot be read as Parquet: {error}") from None
    return pixels, formats.most_common(1)[0][0]


def _column(names: list[str], expected: tuple[str, ...], path: Path) -> str:
    for name in expected:
        if name in names:
            return name
    raise DataError(
        f"{path} has no column {' or '.join(map(repr, expected))}\n"
        f"  its columns: {', '.join(names) or 'none'}\n  expected: {_LAYOUT}"
    )


def _file_bytes(value: object, row: int, table: ImageTable) -> tuple[bytes, str]:
    """The bytes of one cell, and what names it in errors."""
    where = f"row {row} of {table.path}"
    data = value
    if isinstance(value, dict):
        data = value.get("bytes")
        where += f" ({value['path']})" if value.get("path") else ""
    if data is None:
        raise DataError(f"{where}: the image's bytes are missing")
    if not isinstance(data, bytes):
        raise DataError(f"{where}: column {table.image_column!r} holds {type(data).__name__}\n  expected: {_LAYOUT}")
    return data, where


def _classes(column: pa.Array, num_classes: int | None, path: Path) -> tuple[Rows, int]:
    """Labels as classes 0 ... n - 1, and n."""
    if isinstance(column, pa.ChunkedArray):  # a dictionary column with differing dictionaries stays in chunks
        column = pa.concat_arrays(column.unify_dictionaries().chunks)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"row {row} of {path}: the label is missing\n  expected: a label in every row")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        distinct, classes = np.unique(np.array(column.to_pylist(), dtype=str), return_inverse=True)
        return classes.astype(np.int64), len(distinct)
    if not pa.types.is_integer(column.type):
        raise DataError(f"{path}: labels of type {column.type}\n  expected: integer or text")
    values = column.to_numpy(zero_copy_only=False)
    outside = np.flatnonzero(values < 0 if num_classes is None else (values < 0) | (values >= num_classes))
    if len(outside):
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataError(
            f"row {outside[0]} of {path}: label {values[outside[0]]} is out of range\n  expected: {expected}"
        )
    if num_classes is not None:
        return values.astype(np.int64), num_classes
    distinct, classes = np.unique(values, return_inverse=True)
    return classes.astype(np.int64), len(distinct)


def _declared_classes(schema: pa.Schema, label_column: str) -> int | None:
    """The number of class names that the hub's metadata lists, None without them."""
    try:
        found: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = found["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return len(names) if isinstance(names, list) and names else None
