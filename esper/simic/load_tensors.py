"""Transitions kept as one file beside their version: the second time they are mapped into memory, not computed.

A sealed version never changes, so its transitions under a view and rewards do not either. The file's name says what it
holds: the version's digest, the view, the rewards, the selection, and the bytes of the code that made it. Any change
of these is another file, and a file that is deleted is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from esper.karn import tables, versions
from esper.leyline import actions, observations, rewards, schema, views
from esper.leyline.identity import Role
from esper.leyline.keys import hex_digest
from esper.leyline.rewards import RewardSpec
from esper.simic import batches
from esper.simic.batches import Transitions, load_transitions

if TYPE_CHECKING:
    from esper.karn.versions import Version

FOLDER = "tensors"

_CODE = (actions, batches, observations, rewards, schema, tables, versions, views)
"""What decides what the arrays hold."""

_WORDS = ("view", "environments", "num_left_out")
_WORDS_KEY = "words"
_CHECKSUM_KEY = "checksum"


def load_tensors(
    version: Version,
    view: str,
    rewards: Mapping[str, RewardSpec],
    roles: Sequence[str] = (Role.DATA.value,),
    keep: pc.Expression | None = None,
) -> Transitions:
    """Return what `load_transitions` returns, from the file beside the version where there is one, else write it.

    The arrays are private: writing into them changes no file. Where the store cannot be written nothing is kept.

    Args:
        version: The version.
        view: Observation view.
        rewards: The reward of each environment by its name.
        roles: Which episodes; selection and evaluation are refused.
        keep: Which of them, as a condition on the columns of `episodes`; all where None.

    Raises:
        SpecError: A role that learners must not see, or no episode left.
        UnknownNameError: An environment without a reward.
        IntegrityError: Rows that contradict each other, or a file of the version is missing.
    """
    version.files("steps")  # a version that is not whole is an error with or without a kept file
    path = version.root / FOLDER / f"{version.number}-{_key(version, view, rewards, roles, keep)}.safetensors"
    found = _read(path)
    if found is None:
        found = load_transitions(version, view, rewards, roles, keep)
        with contextlib.suppress(OSError):
            _write(path, found)
    return found


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


def _write(path: Path, transitions: Transitions) -> None:
    """Write the file, whole or not at all."""
    from safetensors.numpy import save_file

    values = {name: getattr(transitions, name) for name in Transitions.__slots__}
    arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    known = {name: values[name] for name in _WORDS} | {_CHECKSUM_KEY: _checksum(arrays)}
    words = json.dumps(known)  # one entry: of several the file's order would vary
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(arrays, temporary, metadata={_WORDS_KEY: words})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Transitions | None:
    """The file's transitions, mapped copy-on-write; None without a file, or where it is damaged: it is made again."""
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="np") as file:
            known = json.loads(file.metadata()[_WORDS_KEY])
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError):
        return None
    if known.pop(_CHECKSUM_KEY) != _checksum(arrays):
        return None
    fields: dict[str, Any] = {**arrays, **known, "environments": tuple(known["environments"])}
    return Transitions(**fields)


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return the Adler-32 of all arrays: the fastest sum at hand that no changed byte escapes."""
    total = 1
    for name in sorted(arrays):
        total = zlib.adler32(arrays[name].reshape(-1).view(np.uint8).data, total)
    return total
