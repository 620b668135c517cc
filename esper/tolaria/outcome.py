"""How an episode ends: the committed network is the host with its fossils, and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.leyline.actions import MAX_SLOTS
from esper.tolaria.interactions import MAX_SHAPLEY_SEEDS, shapley_values, subset_accuracies
from esper.tolaria.lineage import Lineage, Outcome
from esper.tolaria.probes import score, switched_off
from esper.tolaria.tasks import TaskData


@torch.no_grad()
def final_outcome(lineage: Lineage, extra_params: int, data: TaskData) -> Outcome:
    """Return the accuracies of the committed and the uncommitted network; computed once per lineage.

    Where the environment asks, with the Shapley value of every seed in the uncommitted one, on all validation rows.

    Args:
        lineage: Where the episode ended.
        extra_params: Parameters that the root's host has beyond the environment's own.
        data: The task.
    """
    if lineage.outcome is None:
        network = lineage.network
        network.train_mode(False)

        def run(x: Tensor) -> Tensor:
            return network.run(x)[0]

        whole = (score(run, data.val), score(run, data.test))
        fossils = [slot for slot, graft in network.grafts.items() if graft.fossil]
        uncommitted = network.grafts.keys() - fossils
        committed = whole
        if uncommitted:
            with switched_off(network, uncommitted):
                committed = (score(run, data.val), score(run, data.test))
        lineage.outcome = Outcome(
            final_val_accuracy=committed[0],
            final_test_accuracy=committed[1],
            uncommitted_val_accuracy=whole[0],
            uncommitted_test_accuracy=whole[1],
            seed_params=sum(lineage.seeds[slot].num_params for slot in fossils) + extra_params,
            num_fossils=len(fossils),
            shapley=_shapley(lineage, data) if lineage.spec.probe_shapley else None,
        )
    return lineage.outcome


def _shapley(lineage: Lineage, data: TaskData) -> tuple[float, ...] | None:
    """Return the values per slot in points, NaN without a seed; None without any seed, or with too many."""
    grafts = lineage.network.grafts
    if not 1 <= len(grafts) <= MAX_SHAPLEY_SEEDS:
        return None
    values = shapley_values(subset_accuracies(lineage.network, data.val))
    return tuple(100 * values[slot] if slot in values else math.nan for slot in range(MAX_SLOTS))


def diverged_outcome(lineage: Lineage, extra_params: int, data: TaskData) -> Outcome:
    """Return the outcome of a host that is no longer finite: chance."""
    fossils = [slot for slot, graft in lineage.network.grafts.items() if graft.fossil]
    return Outcome(
        final_val_accuracy=data.chance,
        final_test_accuracy=data.chance,
        uncommitted_val_accuracy=data.chance,
        uncommitted_test_accuracy=data.chance,
        seed_params=sum(lineage.seeds[slot].num_params for slot in fossils) + extra_params,
        num_fossils=len(fossils),
    )
