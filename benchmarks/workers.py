"""Two worker processes against one, on the same cohorts. Both pools are warm; the time is wall time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import compare, options, show, write
from benchmarks.plans import TINY, row_of_31
from esper.tolaria.workers import CohortPool

NAME = "workers"

COHORTS = 8
"""Enough that the worker which ends first does not idle for long."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure eight cohorts of equal size."""
    chosen = options(__doc__ or "", rounds=3, arguments=arguments)
    size = TINY if chosen.quick else {"horizon": 8}
    behaviours = 2 if chosen.quick else 4
    plans = [row_of_31(replicate, behaviours, **size) for replicate in range(COHORTS)]
    with CohortPool(1) as one, CohortPool(2) as two:
        compared = compare(lambda: one.run_all(plans), lambda: two.run_all(plans), chosen.rounds)
    record = compared.record(
        NAME, f"2 workers, {COHORTS} cohorts of {len(plans[0].episodes)} episodes", "wall s", clock="wall"
    )
    del record["ratio_cpu"]  # the work is not this process's
    show(record)
    write(NAME, [record], chosen.output)


if __name__ == "__main__":
    main()
