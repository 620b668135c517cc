"""Transitions kept as one file beside their version: from the second time on they are read, not computed.

A sealed version never changes, so its transitions under a view and rewards do not either. The file's name says what it
holds: the version's digest, the view, the rewards, the selection, and the bytes of the code that made it. Any change
of these is another file, and a file that is deleted is made again. It is a safetensors file, written a block of
episodes at a time. Where it fits into memory its arrays are mapped; where not, states stay on disk (`row_files`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors import SafetensorError

from esper.karn import tables, versions
from esper.leyline import actions, observations, rewards, schema, views
from esper.leyline.identity import Role
from esper.leyline.keys import hex_digest
from esper.leyline.rewards import RewardSpec
from esper.simic import batches
from esper.simic.batches import Transitions, joined, load_transitions, transition_blocks
from esper.simic.row_files import FileRows, PackedRows

if TYPE_CHECKING:
    from esper.karn.versions import Version

FOLDER = "tensors"

_CODE = (actions, batches, observations, rewards, schema, tables, versions, views)
"""What decides what the arrays hold."""

_WORDS = ("view", "environments", "num_left_out")
_WORDS_KEY = "words"
_CHECKSUM_KEY = "checksum"
_PADDING = "padding"
_METADATA = "__metadata__"
_HEADER_BYTES = 1 << 16
"""Room for the header and the eight bytes of its length before it. It is written last; spaces fill it up."""
_LENGTH = (_HEADER_BYTES - 8).to_bytes(8, "little")
_ALIGNMENT = 8
_CHUNK_BYTES = 1 << 22
_WORD_OF = {"<f4": "F32", "<f8": "F64", "<i8": "I64", "|i1": "I8", "|b1": "BOOL", "|u1": "U8"}
_TYPE_OF = {word: dtype for dtype, word in _WORD_OF.items()}

Entries = dict[str, dict[str, Any]]
"""By array its type, shape and place in the data, as safetensors has them."""


def load_tensors(
    version: Version,
    view: str,
    rewards: Mapping[str, RewardSpec],
    roles: Sequence[str] = (Role.DATA.value,),
    keep: pc.Expression | None = None,
    *,
    budget_bytes: int | None = None,
) -> Transitions:
    """Return what `load_transitions` returns, from the file beside the version where there is one, else write it.

    The arrays are private: writing into them changes no file. Where the store cannot be written nothing is kept, and
    all is in memory.

    Args:
        version: The version.
        view: Observation view.
        rewards: The reward of each environment by its name.
        roles: Which episodes; selection and evaluation are refused.
        keep: Which of them, as a condition on the columns of `episodes`; all where None.
        budget_bytes: Where the file is larger than this, `obs_MV` stays on disk and `mask_MT` packed: they are indexed
            as arrays are and are none (`FileRows`, `PackedRows`). Arrays in memory where None.

    Raises:
        SpecError: A role that learners must not see, or no episode left.
        UnknownNameError: An environment without a reward.
        IntegrityError: Rows that contradict each other, or a file of the version is missing.
    """
    version.files("steps")  # a version that is not whole is an error with or without a kept file
    path = version.root / FOLDER / f"{version.number}-{_key(version, view, rewards, roles, keep)}.safetensors"
    found = _read(path, budget_bytes)
    if found is None:
        with contextlib.suppress(OSError):
            _write(path, transition_blocks(version, view, rewards, roles, keep))
            found = _read(path, budget_bytes)
    return load_transitions(version, view, rewards, roles, keep) if found is None else found


def _key(
    version: Version,
    view: str,
    rewards: Mapping[str, RewardSpec],
    roles: Sequence[str],
    keep: pc.Expression | None,
) -> str:
    reward_ids = sorted([name, spec.spec_id] for name, spec in rewards.items())
    condition = None if keep is None else str(keep)
    parts = [version.manifest.digest, view, reward_ids, sorted(roles), condition, _code_digest()]
    return hex_digest(parts, 24)


@lru_cache(maxsize=1)
def _code_digest() -> str:
    digest = hashlib.sha256()
    for module in _CODE:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _write(path: Path, blocks: Iterable[Transitions]) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w+b") as file:
            file.write(bytes(_HEADER_BYTES))
            entries, words = _write_arrays(file, blocks)
            words |= {_CHECKSUM_KEY: _checksum(file, entries, words)}
            header = {_METADATA: {_WORDS_KEY: json.dumps(words)}, **entries}  # one entry: of several the order varies
            text = json.dumps(header, separators=(",", ":")).encode()
            if len(text) > _HEADER_BYTES - 8:
                raise OSError(errno.EFBIG, "the names of the environments do not fit into the header")
            file.seek(0)
            file.write(_LENGTH + text.ljust(_HEADER_BYTES - 8))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_arrays(file: IO[bytes], blocks: Iterable[Transitions]) -> tuple[Entries, dict[str, Any]]:
    """Write the states as they come, and what is small of all blocks behind them; return where what lies, and words."""
    rest: list[Transitions] = []
    masks: list[PackedRows] = []
    for block in blocks:
        file.write(np.ascontiguousarray(block.obs_MV).data)
        masks.append(PackedRows.of([block.mask_MT], block.mask_MT.shape[1]))
        rest.append(replace(block, obs_MV=block.obs_MV[:0].copy(), mask_MT=block.mask_MT[:0].copy()))  # no view of it
    whole = joined(rest)
    num = sum(len(mask) for mask in masks)
    entries: Entries = {}
    end = _enter(entries, "obs_MV", whole.obs_MV.dtype, (num, whole.obs_MV.shape[1]), 0)
    arrays = {name: value for name in Transitions.__slots__ if isinstance(value := getattr(whole, name), np.ndarray)}
    small = sorted(arrays.keys() - {"obs_MV", "mask_MT"}, key=lambda name: (-arrays[name].itemsize, name))
    arrays[_PADDING] = np.zeros(-end % _ALIGNMENT, np.uint8)
    for name in [_PADDING, *small]:
        file.write(np.ascontiguousarray(arrays[name]).data)
        end = _enter(entries, name, arrays[name].dtype, arrays[name].shape, end)
    _enter(entries, "mask_MT", whole.mask_MT.dtype, (num, whole.mask_MT.shape[1]), end)
    for mask in masks:
        file.write(mask[:].data)
    return entries, {name: getattr(whole, name) for name in _WORDS}


def _enter(entries: Entries, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], begin: int) -> int:
    """Note where an array lies; return the byte behind it."""
    end = begin + math.prod(shape) * dtype.itemsize
    entries[name] = {"dtype": _WORD_OF[dtype.str], "shape": list(shape), "data_offsets": [begin, end]}
    return end


def _read(path: Path, budget_bytes: int | None) -> Transitions | None:
    """The file's transitions; None without a file, or where it is damaged: it is made again."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            if header is None:
                return None
            entries, words = header
            if words.pop(_CHECKSUM_KEY, None) != _checksum(file, entries, words):
                return None
        stays = budget_bytes is not None and path.stat().st_size > budget_bytes
        arrays = _from_disk(path, entries) if stays else _mapped(path)
    except (OSError, SafetensorError):
        return None
    fields: dict[str, Any] = {**arrays, **words, "environments": tuple(words["environments"])}
    return Transitions(**fields)


def _read_header(file: IO[bytes]) -> tuple[Entries, dict[str, Any]] | None:
    """Where the arrays lie, and the words; None of a file that is not as long as it says."""
    text = file.read(_HEADER_BYTES)
    try:
        entries: Entries = json.loads(text[8:])
        words: dict[str, Any] = json.loads(entries.pop(_METADATA)[_WORDS_KEY])
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = text[:8] == _LENGTH and file.seek(0, os.SEEK_END) == _HEADER_BYTES + end
    return (entries, words) if whole else None


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays, mapped copy-on-write."""
    from safetensors.torch import load_file

    return {name: tensor.numpy() for name, tensor in load_file(path).items() if name != _PADDING}


def _from_disk(path: Path, entries: Entries) -> dict[str, Any]:
    """The arrays with the states left on disk and their masks packed."""
    arrays: dict[str, Any] = {}
    for name, entry in entries.items():
        offset, shape = _HEADER_BYTES + entry["data_offsets"][0], entry["shape"]
        dtype = np.dtype(_TYPE_OF[entry["dtype"]])
        if name == "obs_MV":
            arrays[name] = FileRows(path, offset, (shape[0], shape[1]), dtype)
        elif name == "mask_MT":
            stored = FileRows(path, offset, (shape[0], shape[1]), dtype)
            starts = range(0, len(stored), batches.BLOCK_ROWS)
            arrays[name] = PackedRows.of((stored[i : i + batches.BLOCK_ROWS] for i in starts), shape[1])
        elif name != _PADDING:
            arrays[name] = np.fromfile(path, dtype, count=math.prod(shape), offset=offset).reshape(shape)
    return arrays


def _checksum(file: IO[bytes], entries: Entries, words: Mapping[str, Any]) -> int:
    """Return the Adler-32 of what the header says and all arrays: the fastest sum that no changed byte escapes."""
    total = zlib.adler32(json.dumps([entries, words], sort_keys=True).encode())
    for entry in entries.values():
        begin, end = entry["data_offsets"]
        file.seek(_HEADER_BYTES + begin)
        while begin < end and (chunk := file.read(min(_CHUNK_BYTES, end - begin))):
            begin += len(chunk)
            total = zlib.adler32(chunk, total)
    return total
