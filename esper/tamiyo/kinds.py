"""The kinds of policy network: which specification builds which module."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from esper.tamiyo.flat import FlatNet, FlatSpec
from esper.tamiyo.imitation import ImitationNet, ImitationSpec
from esper.tamiyo.networks import NetworkSpec, TreeNet


def _kind(value: Any) -> str:
    """A card without a kind is from a time when every network was a tree."""
    kind = value.get("kind", "tree") if isinstance(value, dict) else getattr(value, "kind", "tree")
    return str(kind)


AnyNetworkSpec = Annotated[
    Annotated[NetworkSpec, Tag("tree")] | Annotated[FlatSpec, Tag("flat")] | Annotated[ImitationSpec, Tag("imitation")],
    Discriminator(_kind),
]
"""The specification of any policy network, told apart by `kind`."""

AnyNetwork = TreeNet | FlatNet | ImitationNet


def build_network(spec: NetworkSpec | FlatSpec | ImitationSpec) -> AnyNetwork:
    """Return a new network of a specification, with fresh weights."""
    if isinstance(spec, FlatSpec):
        return FlatNet(spec)
    if isinstance(spec, ImitationSpec):
        return ImitationNet(spec)
    return TreeNet(spec)
