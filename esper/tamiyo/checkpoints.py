"""Checkpoints: a folder with `policy.safetensors` and `policy.json`, never a pickle, written whole or not at all.

The same specification, data and seed give the same bytes: nothing in the folder tells when or where it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import CheckpointError
from esper.leyline.identity import ENGINE_VERSION
from esper.leyline.spec_base import Spec
from esper.leyline.verdict import Level
from esper.tamiyo.kinds import AnyNetwork, AnyNetworkSpec, build_network

WEIGHTS = "policy.safetensors"
CARD = "policy.json"


class PolicyCard(Spec):
    """What a checkpoint is and where it comes from.

    Attributes:
        algorithm: bc, rwbc, iql, cql, imitate or ppo.
        network: What the weights are of; a card without `kind` is of a tree network.
        recipe: Every field of the learner's specification.
        dataset: `NAME@n` of the sealed version; None where the policy learned from live episodes alone.
        dataset_digest: The digest of that version.
        split: Name of its stored split whose validation seeds were held out; None for the default one.
        verdict: Its level for the use; None where it was never checked.
        unchecked: Training went ahead although the verdict was block or missing.
        override_reason: Why it did, in the words of whoever started it.
        start_digest: Digest of the weights from which PPO started.
        metrics: The last measured values of the training run.
        weights_sha256: SHA-256 of the weights file: the identity of the policy.
    """

    format_version: Literal[1] = 1
    name: str
    algorithm: str
    network: AnyNetworkSpec
    recipe: dict[str, Any]
    rewards: dict[str, dict[str, Any]]
    dataset: str | None = None
    dataset_digest: str | None = None
    split: str | None = None
    verdict: Level | None = None
    unchecked: bool = False
    override_reason: str | None = None
    start_digest: str | None = None
    training_seed: int
    metrics: dict[str, float] = Field(default_factory=dict)
    code_version: str = ""
    engine_version: str = ENGINE_VERSION
    weights_sha256: str = ""


def save_checkpoint(folder: Path, network: AnyNetwork, card: PolicyCard, *, sampled: bool = False) -> LearnedPolicy:
    """Write a checkpoint folder, in place of one that is there, and return the policy's specification.

    The card's network, code version and digest are filled in.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    weights = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    updates = {"network": network.spec, "weights_sha256": digest, "code_version": package_version("esper")}
    full = card.model_copy(update=updates)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / WEIGHTS).write_bytes(weights)
        text = json.dumps(full.model_dump(mode="json"), indent=2, sort_keys=True)
        (temporary / CARD).write_text(text + "\n", encoding="utf-8")
        _put_in_place(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {error.strerror}") from None
    return LearnedPolicy(name=full.name, path=str(folder), digest=digest, sampled=sampled)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename; a non-empty folder cannot be replaced by one, so the old one steps aside first."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_card(folder: Path) -> PolicyCard:
    """Return a checkpoint's card; CheckpointError where it is missing or damaged."""
    path = folder / CARD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return PolicyCard.model_validate(data)
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint at {folder}: {CARD} {error.strerror}\n  expected: a folder that `esper train` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {CARD}: {error}") from None


def load_checkpoint(folder: Path, digest: str | None = None) -> tuple[AnyNetwork, PolicyCard]:
    """Return a checkpoint's network, in evaluation mode, and its card.

    Args:
        folder: The checkpoint.
        digest: The SHA-256 that its weights must have.

    Raises:
        CheckpointError: Missing, damaged, made for another network, or not the policy that `digest` names.
    """
    card = read_card(folder)
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {WEIGHTS} {error.strerror}") from None
    found = hashlib.sha256(weights).hexdigest()
    if found != card.weights_sha256:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {WEIGHTS} has SHA-256 {found[:16]}…\n"
            f"  expected: {card.weights_sha256[:16]}…, as {CARD} says"
        )
    if digest is not None and digest != found:
        raise CheckpointError(
            f"checkpoint {folder} holds another policy: {found[:16]}…\n  expected: {digest[:16]}…\n"
            "  it was written again since; use the specification that its training run returned"
        )
    network = build_network(card.network)
    try:
        network.load_state_dict(load(weights))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit its network {card.network}: {error}") from None
    return network.eval(), card
