"""Blueprints: the modules that a seed can be, eight for each topology."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from esper.kasmina.blueprints.cnn import CNN_REGISTRY
from esper.kasmina.blueprints.transformer import TRANSFORMER_REGISTRY
from esper.leyline.errors import unknown_name
from esper.leyline.host_specs import BLUEPRINTS, Topology

REGISTRIES: dict[Topology, dict[str, Callable[[int], nn.Module]]] = {
    "cnn": CNN_REGISTRY,
    "transformer": TRANSFORMER_REGISTRY,
}
"""From topology and name to what builds the module; the names are those of `esper.leyline.host_specs.BLUEPRINTS`."""


def build_blueprint(topology: Topology, name: str, channels: int) -> nn.Module:
    """Return a freshly initialised increment for a slot of that many channels.

    Raises:
        UnknownNameError: The topology has no such blueprint.
    """
    registry = REGISTRIES[topology]
    if name not in registry:
        raise unknown_name("blueprint", name, BLUEPRINTS[topology])
    return registry[name](channels)
