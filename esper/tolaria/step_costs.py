"""What the last epoch of a cohort cost each episode: alone, and shared with the riders of its lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.kasmina.lifecycle import SeedKey
from esper.leyline.identity import Root
from esper.tolaria.cost import HostCosts, lineage_epoch_flops
from esper.tolaria.episode import Rider
from esper.tolaria.lineage import Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """CPU seconds of the last epoch, training operations and riders of the lineage, per episode (0 once ended)."""

    cpu_s_alone_K: NDArray[np.float64]
    cpu_s_shared_K: NDArray[np.float64]
    riders_K: NDArray[np.int64]
    flops_K: NDArray[np.float64]


def no_costs(num_episodes: int) -> StepCosts:
    """Return the costs before the first epoch."""
    zero = np.zeros(num_episodes)
    return StepCosts(
        cpu_s_alone_K=zero, cpu_s_shared_K=zero, riders_K=np.zeros(num_episodes, dtype=np.int64), flops_K=zero
    )


def count_costs(
    riders: Sequence[Rider], lineages: Mapping[str, Lineage], host_costs: Mapping[str, HostCosts]
) -> StepCosts:
    """Return the costs of the epoch that has just run, before any episode is closed or moved.

    Args:
        riders: All episodes of the cohort.
        lineages: The lineages that ran, by host_key.
        host_costs: Costs of each root's host.
    """
    active = [rider for rider in riders if not rider.done]
    riding = [rider.lineage.host_key for rider in active]
    roots = {rider.lineage.host_key: rider.root for rider in active}
    users: dict[tuple[str, SeedKey], int] = {}
    for rider in active:
        for key in rider.incubating():
            users[rider.lineage.host_key, key] = users.get((rider.lineage.host_key, key), 0) + 1
    operations = {
        key: lineage_epoch_flops(lineage, host_costs[roots.get(key, Root.HOST.value)])
        for key, lineage in lineages.items()
    }
    alone, shared, flops = np.zeros(len(riders)), np.zeros(len(riders)), np.zeros(len(riders))
    mates = np.zeros(len(riders), dtype=np.int64)
    for rider in active:
        lineage = rider.lineage
        host, own = operations[lineage.host_key]
        incubations = [lineage.incubations[key] for key in rider.incubating()]
        mates[rider.index] = riding.count(lineage.host_key)
        alone[rider.index] = lineage.cpu_s + sum(i.cpu_s for i in incubations)
        shared[rider.index] = lineage.cpu_s / mates[rider.index] + sum(
            i.cpu_s / users[lineage.host_key, i.key] for i in incubations
        )
        flops[rider.index] = host + sum(own[i.key] for i in incubations)
    return StepCosts(cpu_s_alone_K=alone, cpu_s_shared_K=shared, riders_K=mates, flops_K=flops)
