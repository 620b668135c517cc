"""How an episode ends: the committed network is the host with its fossils, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.tolaria.lineage import Lineage, Outcome
from esper.tolaria.probes import score
from esper.tolaria.tasks import TaskData


@torch.no_grad()
def final_outcome(lineage: Lineage, extra_params: int, data: TaskData) -> Outcome:
    """Return the accuracies of the committed and the uncommitted network; computed once per lineage.

    Args:
        lineage: Where the episode ended.
        extra_params: Parameters that the root's host has beyond the environment's own.
        data: The task.
    """
    if lineage.outcome is None:
        network = lineage.network
        network.train_mode(False)

        def run(x_BCHW: Tensor) -> Tensor:
            return network.run(x_BCHW)[0]

        whole = (score(run, data.val), score(run, data.test))
        grafts = network.grafts
        network.grafts = {slot: graft for slot, graft in grafts.items() if graft.fossil}
        same = len(network.grafts) == len(grafts)
        committed = whole if same else (score(run, data.val), score(run, data.test))
        fossils = list(network.grafts)
        network.grafts = grafts
        lineage.outcome = Outcome(
            final_val_accuracy=committed[0],
            final_test_accuracy=committed[1],
            uncommitted_val_accuracy=whole[0],
            uncommitted_test_accuracy=whole[1],
            seed_params=sum(lineage.seeds[slot].num_params for slot in fossils) + extra_params,
            num_fossils=len(fossils),
        )
    return lineage.outcome


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
