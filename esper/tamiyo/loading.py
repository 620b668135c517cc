"""From a checkpoint to the controller that acts by it, whatever its kind of network."""

from __future__ import annotations

from pathlib import Path

from esper.leyline.protocols import Controller
from esper.tamiyo.checkpoints import load_checkpoint
from esper.tamiyo.flat import FlatController, FlatNet
from esper.tamiyo.imitation import ImitationController, ImitationNet
from esper.tamiyo.kinds import AnyNetwork, build_network
from esper.tamiyo.policy import LearnedController

__all__ = ["build_controller_of", "build_network", "load_policy"]


def build_controller_of(network: AnyNetwork, *, name: str, sampled: bool) -> Controller:
    """Return the controller of a network."""
    if isinstance(network, FlatNet):
        return FlatController(network, name=name, sampled=sampled)
    if isinstance(network, ImitationNet):
        return ImitationController(network, name=name, sampled=sampled)
    return LearnedController(network, name=name, sampled=sampled)


def load_policy(path: Path, *, sampled: bool, name: str | None = None, digest: str | None = None) -> Controller:
    """Return the controller of a checkpoint.

    Args:
        path: The checkpoint folder.
        sampled: Draw from the policy instead of taking its most probable choices.
        name: The actor's name; the checkpoint's own unless given.
        digest: The SHA-256 that the weights must have (`LearnedPolicy.digest`).

    Raises:
        CheckpointError: Missing, damaged, for another network or of another digest.
    """
    network, card = load_checkpoint(path, digest)
    return build_controller_of(network, name=name or card.name, sampled=sampled)
