"""Training that a kill cannot lose: the state of each phase on disk, from which it goes on to the same bytes.

A phase is one loop of gradient steps ("values", then "policy"). Its state is one safetensors file whose metadata hold
the rest as JSON, put in place by a rename: whenever a process is killed, the folder holds a whole state of the phase or
none. Nothing in it can run as code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.tolaria.checkpoint_parts import Packer, Unpacker, Vocabulary

FORMAT_VERSION = "1"
SUFFIX = ".safetensors"
PLAIN = Vocabulary.of(records=(), enums=())


class Stateful(Protocol):
    """What has a state of tensors, arrays, numbers, strings, and dicts, lists and tuples of them.

    A `torch.nn.Module` and a `torch.optim.Optimizer` are such parts.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take on a state."""
        ...


class TorchRandom:
    """Torch's global generator (on the CPU) as a part of a training run: dropout and input noise draw from it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the generator's state."""
        return {"generator": torch.get_rng_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Set the generator's state."""
        torch.set_rng_state(state_dict["generator"])


class Notes(dict[str, Any]):
    """Plain values of a loop that must survive with it: running sums, the best loss, the weights that had it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the values."""
        return dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Replace all values."""
        self.clear()
        self.update(state_dict)


class Progress:
    """The stored progress of one training run; a folder belongs to one run alone.

    A loop uses it so, and ends with the same parts whether or not it was killed on the way:

        first = progress.restore("policy", parts)
        for step in range(first + 1, steps + 1):
            ...
            progress.save("policy", step, parts, last=step == steps)
    """

    def __init__(self, folder: Path, every_steps: int, identity: str = "") -> None:
        """Args: `identity` says whose progress it is (a digest of recipe, data and seed); another's is refused."""
        if every_steps < 1:
            raise SpecError(f"progress stored every {every_steps} steps\n  expected: 1 or more")
        self._folder = folder
        self._every_steps = every_steps
        self._identity = identity

    def restore(self, phase: str, parts: Mapping[str, Stateful]) -> int:
        """Load the stored state of a phase into its parts and return how many of its steps are done.

        That number is also the first step still to do, counted from 0. It is 0, and no part is touched, where nothing
        is stored.

        Raises:
            IntegrityError: The file is damaged.
            SpecError: It is of another run or another version, or of other parts.
        """
        header = self._header(phase)
        if header is None:
            return 0
        path = self._path(phase)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None
        if hashlib.sha256(save(tensors) + header["state"].encode()).hexdigest() != header["sha256"]:
            raise _damaged(path, "it is not what was written")
        state = Unpacker(PLAIN, tensors).unpack(json.loads(header["state"]))
        if list(state) != list(parts):
            raise SpecError(f"{path} holds the parts {list(state)}\n  expected: {list(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(header["step"])

    def save(self, phase: str, step: int, parts: Mapping[str, Stateful], *, last: bool = False) -> None:
        """Store a phase after a step, where it is due: every `every_steps` steps, and after the last one.

        Args:
            phase: The loop.
            step: Steps done.
            parts: All that the following steps depend on; the same names in the same order as for `restore`.
            last: Whether the phase ends with this step.

        Raises:
            StoreError: The folder cannot be written.
        """
        if step % self._every_steps and not last:
            return
        packer = Packer(PLAIN)
        state = json.dumps(packer.pack({name: part.state_dict() for name, part in parts.items()}), allow_nan=False)
        header = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity,
            "step": str(step),
            "finished": str(int(last)),
            "state": state,
            "sha256": hashlib.sha256(save(packer.tensors) + state.encode()).hexdigest(),
        }
        path = self._path(phase)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(save(packer.tensors, metadata=header))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from None

    def finished(self, phase: str) -> bool:
        """Return whether a phase is stored after its last step."""
        header = self._header(phase)
        return header is not None and header["finished"] == "1"

    def remove(self) -> None:
        """Delete what is stored; the run is over. Its parent folder goes too where nothing else is in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()

    def _path(self, phase: str) -> Path:
        return self._folder / f"{phase}{SUFFIX}"

    def _header(self, phase: str) -> dict[str, str] | None:
        path = self._path(phase)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from None
        if header.get("format_version") != FORMAT_VERSION or header.get("identity") != self._identity:
            raise SpecError(
                f"{path} is the progress of another training run: recipe, data, seed or version differ\n"
                "  finish that one with what it began with, choose another --run-name, or delete the folder"
            )
        return header


def _damaged(path: Path, what: str) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {what}\n  delete the folder to start over")
