"""Small image files and Parquet files of them, for tests of tasks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    """The bytes of an image file, from uint8 [H, W, 3] or [H, W]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=file_format)
    return file.getvalue()


def noise(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Random images, uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def png_that_claims(width: int, height: int) -> bytes:
    """A file of a few dozen bytes whose header promises an image of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_table(path: Path, images: Sequence[bytes | None], labels: object, **names: str) -> Path:
    """A Parquet file of the Hugging Face layout."""
    cells = [{"bytes": data, "path": f"made/{index}.png"} for index, data in enumerate(images)]
    table = {names.get("img", "img"): pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        table[names.get("label", "label")] = labels if isinstance(labels, pa.Array) else pa.array(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path


def write_cifar(folder: Path, train: int = 60, test: int = 20) -> np.ndarray:
    """Both files of a made-up CIFAR-10, lossless; returns the training images."""
    pixels = noise(train)
    write_table(folder / "train.parquet", [encoded(x) for x in pixels], [i % 10 for i in range(train)])
    write_table(folder / "test.parquet", [encoded(x) for x in noise(test, seed=1)], [i % 10 for i in range(test)])
    return pixels
