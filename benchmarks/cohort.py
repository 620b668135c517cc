"""A cohort: the 31 episodes of a matrix row together, against each of them alone.

Alone, an episode is a cohort of one: it too runs its control. Host epochs are counted exactly, on both sides; the wall
ratio shows how much of what is not computed is not waited for either.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import Record, compare, options, show, summary, write
from benchmarks.plans import TINY, alone, row_of_31
from esper.leyline.matrix import CohortPlan
from esper.tolaria.rollout import CohortRun

NAME = "cohort"


def host_epochs(plans: Sequence[CohortPlan]) -> int:
    """Run cohorts to their tables; return the host epochs that were computed."""
    total = 0
    for plan in plans:
        run = CohortRun.of(plan)
        run.recorder.tables("benchmark")
        total += run.cohort.num_host_epochs
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the row of digits-gap."""
    chosen = options(__doc__ or "", rounds=3, arguments=arguments)
    plan = row_of_31(behaviours=2, **TINY) if chosen.quick else row_of_31()
    singles = alone(plan)
    host_epochs([row_of_31(behaviours=1, **TINY)])  # warm up
    counts: dict[str, int] = {}
    compared = compare(
        lambda: counts.update(alone=host_epochs(singles)),
        lambda: counts.update(together=host_epochs([plan])),
        chosen.rounds,
        warm_up=0,
    )
    episodes, horizon = len(plan.episodes), plan.environment.horizon
    ratio = counts["alone"] / counts["together"]
    wall = compared.record(NAME, f"{episodes} episodes, wall", "wall s", clock="wall", host_epoch_ratio=ratio)
    wall["share_of_host_epoch_ratio"] = wall_share = float(str(wall["ratio"])) / ratio
    records: list[Record] = [
        summary(
            NAME,
            f"{episodes} episodes, host epochs",
            [ratio],
            "host epochs",
            reference=counts["alone"],
            esper=counts["together"],
            without_controls=episodes * horizon / counts["together"],
        ),
        wall,
    ]
    for record in records:
        show(record)
    print(f"{'':<8} wall ratio / host-epoch ratio {wall_share:.3f}")
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
