"""A cohort: the 31 episodes of a matrix row together, against each of them alone.

Alone, an episode is a cohort of one: it too runs its control. Host epochs are counted exactly, on both sides, and so
are epochs of incubating seeds, which episodes seldom share; the wall ratio is what both come to.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import Record, compare, options, show, summary, write
from benchmarks.plans import TINY, alone, row_of_31
from esper.leyline.matrix import CohortPlan
from esper.tolaria.executor import SerialExecutor
from esper.tolaria.lineage import Lineage
from esper.tolaria.rollout import CohortRun
from esper.tolaria.tasks import TaskData

NAME = "cohort"


class Counting(SerialExecutor):
    """Counts what it runs."""

    def __init__(self) -> None:
        self.host_epochs = self.incubation_epochs = 0

    def run_epoch(self, lineages: Sequence[Lineage], data: TaskData, env_seed: int, epoch: int) -> None:
        """Run the epoch and count it."""
        self.host_epochs += len(lineages)
        self.incubation_epochs += sum(len(lineage.training_incubations()) for lineage in lineages)
        super().run_epoch(lineages, data, env_seed, epoch)


def computed(plans: Sequence[CohortPlan]) -> tuple[int, int]:
    """Run cohorts to their tables; return the host epochs and the incubation epochs that were computed."""
    counter = Counting()
    for plan in plans:
        CohortRun.of(plan, counter).recorder.tables("benchmark")
    return counter.host_epochs, counter.incubation_epochs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the row of digits-gap."""
    chosen = options(__doc__ or "", rounds=2, arguments=arguments)
    plan = row_of_31(behaviours=2, **TINY) if chosen.quick else row_of_31()
    singles = alone(plan)
    computed([row_of_31(behaviours=1, **TINY)])  # warm up
    counts: dict[str, tuple[int, int]] = {}
    compared = compare(
        lambda: counts.update(alone=computed(singles)),
        lambda: counts.update(together=computed([plan])),
        chosen.rounds,
        warm_up=0,
    )
    episodes, horizon = len(plan.episodes), plan.environment.horizon
    alone_epochs, together_epochs = counts["alone"][0], counts["together"][0]
    ratio = alone_epochs / together_epochs
    wall = compared.record(NAME, f"{episodes} episodes, wall", "wall s", clock="wall", host_epoch_ratio=ratio)
    wall["share_of_host_epoch_ratio"] = wall_share = float(str(wall["ratio"])) / ratio
    records: list[Record] = [
        summary(
            NAME,
            f"{episodes} episodes, host epochs",
            [ratio],
            "host epochs",
            reference=alone_epochs,
            esper=together_epochs,
            without_controls=episodes * horizon / together_epochs,
        ),
        summary(
            NAME,
            f"{episodes} episodes, incubation epochs",
            [counts["alone"][1] / max(counts["together"][1], 1)],
            "incubation epochs",
            reference=counts["alone"][1],
            esper=counts["together"][1],
        ),
        wall,
    ]
    for record in records:
        show(record)
    print(f"{'':<8} wall ratio / host-epoch ratio {wall_share:.3f}")
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
