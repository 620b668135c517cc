"""Rows that stay on disk: read by index as an array in memory is, without ever being resident as a whole.

Rows are read with `preadv` into memory of the caller's. A mapped file would do as well, but each of its pages that was
touched counts as memory of the process until the kernel takes it back; what the kernel caches of a read file does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import Bools
from esper.leyline.errors import IntegrityError, SpecError

Index = NDArray[np.integer[Any]] | slice

ENVIRONMENT_VARIABLE = "ESPER_MEMORY_MB"

_CGROUP = Path("/sys/fs/cgroup")
_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""Read only what is cached; where a platform has no such flag every read waits."""


def memory_budget(given_mb: str | None = None) -> int:
    """Return how many bytes of training tensors may be held in memory.

    What it is has no part in what is learned: a larger set is read from disk as it is needed, and gives the same bytes.

    Args:
        given_mb: Megabytes (10**6 bytes) as text; $ESPER_MEMORY_MB unless given, and without that half of the memory
            that is available to this process.

    Raises:
        SpecError: Not a whole number of megabytes.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "") if given_mb is None else given_mb
    if not text:
        return _available_memory() // 2
    if not text.isdecimal():
        raise SpecError(f"{ENVIRONMENT_VARIABLE}={text!r}\n  expected: a whole number of megabytes, 0 or more")
    return int(text) * 1_000_000


def _available_memory() -> int:
    """Return the bytes that could be allocated: what the machine has left, within what its control group allows."""
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            left = int(line.split()[1]) * 1024
    limit = _lines(_CGROUP / "memory.max") or _lines(_CGROUP / "memory" / "memory.limit_in_bytes")
    return min([left, *(int(text) for text in limit if text.isdecimal())])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


class FileRows:
    """An array of rows [M, width] that lies in a file: `rows[index]` is a new array, as it is of one in memory.

    The file stays open for as long as the object lives, also where its name is removed meanwhile. Any thread may read.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Rows of `shape` from byte `offset` on; OSError where the file cannot be opened."""
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._offset = offset
        self._row_bytes = shape[1] * self.dtype.itemsize
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.shape[0] * self._row_bytes

    def __getitem__(self, index: Index) -> NDArray[Any]:
        """Return rows by number (an integer array of any shape, none negative) or slice.

        Raises:
            IndexError: There is no such row.
            IntegrityError: The file is shorter than it was.
        """
        wanted = _numbers(index, len(self))
        flat = wanted.reshape(-1)
        out = np.empty((len(flat), self.shape[1]), dtype=self.dtype)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"rows {flat.min()} to {flat.max()} of {len(self)}")
        self._fill(out, flat)
        return out.reshape(*wanted.shape, self.shape[1])

    def _fill(self, out: NDArray[Any], flat: NDArray[np.int64]) -> None:
        """Read rows that follow each other at once; what is not cached is asked for together, then waited for."""
        target = out.reshape(-1).view(np.uint8).data
        starts = np.flatnonzero(np.diff(flat, prepend=-2) != 1) if flat.size else flat
        begins = (starts * self._row_bytes).tolist()
        places = (self._offset + flat[starts] * self._row_bytes).tolist()
        descriptor = self._file.fileno()
        late: list[tuple[memoryview, int]] = []
        for begin, end, place in zip(begins, [*begins[1:], len(target)], places):
            part = target[begin:end]
            if self._cached(part, place) != len(part):
                late.append((part, place))
                os.posix_fadvise(descriptor, place, len(part), os.POSIX_FADV_WILLNEED)
        for part, place in late:
            self._wait_for(part, place)

    def _cached(self, target: memoryview, place: int) -> int:
        """Read what the kernel has in its cache; return how many bytes those are."""
        try:
            return os.preadv(self._file.fileno(), [target], place, _NO_WAIT)
        except OSError:  # nothing cached, or a file system that cannot tell
            return 0

    def _wait_for(self, target: memoryview, place: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], place + done)
            if not count:
                raise IntegrityError(f"{self.path} ends early\n  delete it, and it is made again")
            done += count


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Booleans [M, width] as bits in memory: `rows[index]` is a new array of them.

    Attributes:
        bits: uint8 [M, ceil(width / 8)].
        width: Booleans of a row.
    """

    bits: NDArray[np.uint8]
    width: int

    @classmethod
    def of(cls, blocks: Iterable[Bools], width: int) -> PackedRows:
        """Pack blocks of rows that follow each other."""
        packed = [np.packbits(block, axis=1) for block in blocks]
        return cls(np.concatenate([np.empty((0, math.ceil(width / 8)), np.uint8), *packed]), width)

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return len(self.bits), self.width

    def __getitem__(self, index: Index) -> Bools:
        """Return rows by number (an integer array of any shape) or slice."""
        return np.unpackbits(self.bits[index], axis=-1, count=self.width).view(bool)


def _numbers(index: Index, length: int) -> NDArray[np.int64]:
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    return np.asarray(index, dtype=np.int64)
