"""Columns of Arrow tables as NumPy arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esper.leyline.actions import Bools, Op

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def numbers(batch: pa.Table, name: str) -> Floats:
    """Return a column as float64 [N], NaN where null."""
    column = batch[name].cast(pa.float64()).combine_chunks()
    result: Floats = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
    return result


def flags(batch: pa.Table, name: str) -> Bools:
    """Return a boolean column, bool [N]; null is false."""
    return np.asarray(pc.fill_null(batch[name], False).to_numpy(), dtype=bool)


def ops(batch: pa.Table) -> Ints:
    """Return the codes of `op`, int64 [N]; -1 where the name is unknown or null."""
    found = pc.index_in(batch["op"].cast(pa.string()), pa.array([op.name for op in Op]))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)
