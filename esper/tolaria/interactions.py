"""What each seed is worth among the others: the accuracy of every subset of seeds, and the Shapley values from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from esper.kasmina.network import Network
from esper.tolaria.probes import Tally, chunks
from esper.tolaria.tasks import Split

MAX_SHAPLEY_SEEDS = 4
"""Exact values need every subset: 16 passes of the network's last part."""

Subset = frozenset[int]


@torch.no_grad()
def subset_accuracies(network: Network, split: Split) -> dict[Subset, float]:
    """Return the accuracy, a fraction, of the network with every subset of its seeds (slots) heard, the others not.

    Subsets share what lies before the first slot in which they differ.
    """
    tallies: dict[Subset, Tally] = {}
    for x, y in chunks(split):
        for subset, logits in _every_subset(network, 0, x, frozenset()):
            tallies.setdefault(subset, Tally()).add(logits, y)
    return {subset: tally.accuracy() for subset, tally in tallies.items()}


def _every_subset(network: Network, slot: int, h: Tensor, heard: Subset) -> Iterator[tuple[Subset, Tensor]]:
    """Yield each subset with its logits, depth first: one activation a slot is held."""
    if slot == len(network.host.segments):
        yield heard, network.host.classify(h)
        return
    h = network.host.segment(slot, h)
    yield from _every_subset(network, slot + 1, h, heard)
    graft = network.grafts.get(slot)
    if graft is not None:
        yield from _every_subset(network, slot + 1, graft.apply(h), heard | {slot})


def shapley_values(worth: Mapping[Subset, float]) -> dict[int, float]:
    """Return each player's exact Shapley value: its mean gain over all orders in which the players may come.

    Args:
        worth: The worth of every subset of the players, the empty one included.
    """
    players = max(worth, key=len)
    num = len(players)
    values = dict.fromkeys(sorted(players), 0.0)
    for player in values:
        for subset, value in worth.items():
            if player not in subset:
                orders = math.factorial(len(subset)) * math.factorial(num - len(subset) - 1)
                values[player] += orders / math.factorial(num) * (worth[subset | {player}] - value)
    return values
