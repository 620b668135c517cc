"""Names of blueprints across topologies.

A rule that names convolutional blueprints serves a transformer too: each stands for its counterpart there. Somebody who
orders one seed by name (a plant, a forced action) must name a blueprint that the host has.
"""

from __future__ import annotations

from collections.abc import Iterable

from esper.leyline.errors import UnknownNameError, unknown_name
from esper.leyline.host_specs import BLUEPRINTS, Topology

TRANSFORMER_COUNTERPARTS: dict[str, str] = {
    "norm": "norm",
    "attention": "attention",
    "conv_small": "lora",
    "bottleneck": "lora_large",
    "depthwise": "conv",
    "dilated": "gated_mlp",
    "conv_light": "mlp_small",
    "conv_heavy": "mlp",
}
"""The transformer blueprint that does what a convolutional one does: one to one, light to light and heavy to heavy."""

_CNN_COUNTERPARTS = {name: other for other, name in TRANSFORMER_COUNTERPARTS.items()}


def check_blueprint(name: str) -> None:
    """Raise UnknownNameError unless some topology has a blueprint of that name."""
    known = {known for names in BLUEPRINTS.values() for known in names}
    if name not in known:
        raise unknown_name("blueprint", name, known)


def blueprint_code(name: str, topology: Topology) -> int:
    """Return the number that the action tree has for a blueprint of a topology.

    Raises:
        UnknownNameError: The topology has no such blueprint; a name of another topology is told its counterpart.
    """
    if name in BLUEPRINTS[topology]:
        return BLUEPRINTS[topology].index(name)
    check_blueprint(name)
    raise UnknownNameError(
        f"a {topology} host has no blueprint {name!r}\n  expected: one of {', '.join(BLUEPRINTS[topology])}"
        f"\n  its counterpart there is {counterpart(name, topology)!r}"
    )


def counterpart(name: str, topology: Topology) -> str:
    """Return what a blueprint is called on a topology: its own name, or that of its counterpart.

    Raises:
        UnknownNameError: No topology has such a blueprint.
    """
    check_blueprint(name)
    if name in BLUEPRINTS[topology]:
        return name
    return (TRANSFORMER_COUNTERPARTS if topology == "transformer" else _CNN_COUNTERPARTS)[name]


def have_one_topology(names: Iterable[str]) -> bool:
    """Return whether some topology has blueprints of all these names."""
    wanted = set(names)
    return any(wanted <= set(known) for known in BLUEPRINTS.values())
