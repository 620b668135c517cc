"""Exact resume: a cohort on disk at any epoch goes on as if nothing had happened, byte for byte on a CPU.

A folder holds `cohort.json`, which says what everything is, and one safetensors file that it names and whose digest it
holds; never a pickle. Replacing `cohort.json` is what commits a new state: whenever a process is killed, the folder
holds one whole state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import Blend
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.identity import ENGINE_VERSION
from esper.leyline.keys import hex_digest
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import Stage
from esper.tolaria.checkpoint_lineages import pack_flock, unpack_flock
from esper.tolaria.checkpoint_parts import Json, Packer, Unpacker, Vocabulary
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.executor import Executor
from esper.tolaria.governor import GoodState, Intervention, Panic
from esper.tolaria.lineage import BlendedSeed, EpochMetrics, Outcome, SeedMeasures
from esper.tolaria.recorder import Decisions, Moment
from esper.tolaria.runtime import slot_device
from esper.tolaria.step_costs import StepCosts
from esper.tolaria.transitions import Applied

FORMAT_VERSION = 1
CARD = "cohort.json"
TENSORS_SUFFIX = ".safetensors"
_TEMPORARY = ".checkpoint-tmp"

VOCABULARY = Vocabulary.of(
    records=(
        Applied,
        BlendedSeed,
        Decisions,
        EpochMetrics,
        GoodState,
        Intervention,
        Moment,
        Observation,
        Outcome,
        SeedKey,
        SeedMeasures,
        SlotState,
        StepCosts,
    ),
    enums=(Blend, Panic, Stage),
)


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """Where a run keeps its checkpoint, and how often it writes one.

    Attributes:
        folder: Belongs to this run alone, and is removed when the run ends.
        every_epochs: Epochs from one checkpoint to the next.
    """

    folder: Path
    every_epochs: int = 1

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise SpecError(f"a checkpoint every {self.every_epochs} epochs\n  expected: 1 or more")

    def is_due(self, cohort: Cohort) -> bool:
        """Return whether to write one now: at the end only where branches are still to come."""
        return cohort.keep_snapshots if cohort.done else cohort.step_index % self.every_epochs == 0


def save_cohort(cohort: Cohort, folder: Path, beside: Mapping[str, Any] | None = None) -> None:
    """Write a cohort between two steps, in place of what the folder holds.

    Args:
        cohort: The cohort, reset or further.
        folder: Made if it is not there.
        beside: More values to store with it, which `load_run` returns.

    Raises:
        StoreError: The folder cannot be written.
    """
    packer = Packer(VOCABULARY)
    state = {
        "spec": cohort.spec.model_dump(mode="json"),
        "env_seed": cohort.env_seed,
        "roots": list(cohort.roots),
        "data_digest": cohort.data.digest,
        "keep_snapshots": cohort.keep_snapshots,
        "flock": pack_flock(cohort.flock, packer),
        "snapshots": [[step, pack_flock(flock, packer)] for step, flock in cohort.snapshots.items()],
        "control_outcome": packer.pack(cohort.control_outcome),
        "num_host_epochs": cohort.num_host_epochs,
        "step_costs": packer.pack(cohort.step_costs),
        "interventions": packer.pack(cohort.interventions),
        "beside": packer.pack(dict(beside or {})),
    }
    tensors = save(packer.tensors)
    digest = hashlib.sha256(tensors).hexdigest()
    name = f"{digest[:16]}{TENSORS_SUFFIX}"
    card = {
        "format_version": FORMAT_VERSION,
        "engine_version": ENGINE_VERSION,
        "layout": VOCABULARY.layout,
        "tensors": name,
        "tensors_sha256": digest,
        "state": state,
    }
    text = json.dumps({**card, "digest": hex_digest(card)}, separators=(",", ":"), allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / name, tensors)
        _write(folder / CARD, text.encode())
        for stale in _own_files(folder):
            if stale.name not in (CARD, name):
                stale.unlink()
    except OSError as error:
        raise StoreError(f"cannot write checkpoint {folder}: {error.strerror}") from None


def load_cohort(folder: Path, executor: Executor | None = None) -> Cohort:
    """Return the cohort that a folder holds, ready for its next step.

    Raises:
        SpecError: There is none, another version of the engine wrote it, or the task's data are no longer the same.
        IntegrityError: It is damaged.
    """
    return load_run(folder, executor)[0]


def load_run(folder: Path, executor: Executor | None = None) -> tuple[Cohort, dict[str, Any]]:
    """Return the cohort that a folder holds and what was stored beside it; raises as `load_cohort` does."""
    card = _read_card(folder)
    unpacker = Unpacker(VOCABULARY, _read_tensors(folder, card), slot_device())
    state = card["state"]
    spec = EnvironmentSpec.parse(state["spec"], str(folder / CARD))
    cohort = Cohort(spec, state["env_seed"], state["roots"], executor, state["keep_snapshots"])
    if cohort.data.digest != state["data_digest"]:
        raise SpecError(
            f"checkpoint {folder} belongs to task data {state['data_digest']}, found {cohort.data.digest}\n"
            "  restore the data that the run began with, or delete the folder to start over"
        )

    def flock(stored: Json) -> Any:
        return unpack_flock(stored, unpacker, spec, cohort.env_seed, cohort.costs, cohort.data)

    cohort.resume(flock(state["flock"]), {step: flock(stored) for step, stored in state["snapshots"]})
    cohort.control_outcome = unpacker.unpack(state["control_outcome"])
    cohort.num_host_epochs = state["num_host_epochs"]
    cohort.step_costs = unpacker.unpack(state["step_costs"])
    cohort.interventions = unpacker.unpack(state["interventions"])
    return cohort, unpacker.unpack(state["beside"])


def has_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint, whole or damaged."""
    return (folder / CARD).exists()


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, and its folder where nothing else is in it."""
    for path in _own_files(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _own_files(folder: Path) -> list[Path]:
    return [path for pattern in (CARD, f"*{TENSORS_SUFFIX}", f".*{_TEMPORARY}") for path in folder.glob(pattern)]


def _write(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, also where the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no checkpoint at {folder}\n  expected: a folder with {CARD}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"{CARD} cannot be read: {error}") from None
    try:
        card: dict[str, Any] = json.loads(text)
        digest, version = card.pop("digest"), (card["format_version"], card["engine_version"], card["layout"])
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise _damaged(folder, f"{CARD} is not whole") from None
    if hex_digest(card) != digest:
        raise _damaged(folder, f"{CARD} is not what was written")
    if version != (FORMAT_VERSION, ENGINE_VERSION, VOCABULARY.layout):
        raise SpecError(
            f"checkpoint {folder} was written by another version (format, engine, layout: {version})\n"
            f"  expected: {(FORMAT_VERSION, ENGINE_VERSION, VOCABULARY.layout)}\n"
            "  finish it with that version, or delete the folder to start over"
        )
    return card


def _read_tensors(folder: Path, card: Mapping[str, Any]) -> Any:
    try:
        content = (folder / card["tensors"]).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{card['tensors']}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != card["tensors_sha256"]:
        raise _damaged(folder, f"{card['tensors']} is not what was written")
    try:
        return load(content)
    except SafetensorError as error:
        raise _damaged(folder, f"{card['tensors']}: {error}") from None


def _damaged(folder: Path, what: str) -> IntegrityError:
    return IntegrityError(f"checkpoint {folder} is damaged: {what}\n  delete the folder to start over")
