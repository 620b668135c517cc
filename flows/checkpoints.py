"""Policies by the folders of their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError


def named_policies(folders: Sequence[str]) -> dict[str, LearnedPolicy]:
    """Return the policies of checkpoint folders by name; before anything runs, so that a missing one costs nothing.

    Raises:
        CheckpointError: A folder holds no checkpoint.
        SpecError: Two policies have the same name.
    """
    from esper.tamiyo.checkpoints import read_card

    policies: dict[str, LearnedPolicy] = {}
    for folder in folders:
        card = read_card(Path(folder))
        if card.name in policies:
            raise SpecError(f"two policies are called {card.name!r}: {policies[card.name].path} and {folder}")
        policies[card.name] = LearnedPolicy(name=card.name, path=folder, digest=card.weights_sha256)
    return policies
