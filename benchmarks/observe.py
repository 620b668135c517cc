"""What controllers and bookkeeping add to an epoch of 50 batches at 8/16/32.

Everything of a cohort's run counts that is not training, validation or probes: observations, masks, controllers,
gates, forks, the governor's copies, costs, rows. The ratio is that of five per cent of the engine's own work to it:
above 1, it is within five per cent. Digits of 8x8 are the hard case: on larger images the same work is a smaller share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from benchmarks import cases
from benchmarks.common import Comparison, Seconds, options, show, since, started, write
from benchmarks.plans import TINY, alone, row_of_31
from esper.leyline.matrix import CohortPlan
from esper.tolaria import cohort as cohort_module
from esper.tolaria import roots
from esper.tolaria.executor import SerialExecutor
from esper.tolaria.rollout import CohortRun

NAME = "observe"

ALLOWED_SHARE = 0.05


class Stopwatch:
    """Adds up the CPU seconds within the functions that it was put around."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = started()
            try:
                return function(*arguments, **named)
            finally:
                took = since(start)
                self.cpu += took.cpu
                self.wall += took.wall

        return timed


def run(plan: CohortPlan) -> tuple[Seconds, Seconds, int]:
    """Run a cohort to its tables; return what the engine's own work and the rest took, and the host epochs."""
    watch, executor = Stopwatch(), SerialExecutor()
    start = started()
    with (
        mock.patch.object(executor, "run_epoch", watch.around(executor.run_epoch)),
        mock.patch.object(cohort_module, "final_outcome", watch.around(cohort_module.final_outcome)),
        mock.patch.object(roots, "validate", watch.around(roots.validate)),
    ):
        finished = CohortRun.of(plan, executor)
        finished.recorder.tables("benchmark")
    whole = since(start)
    rest = Seconds(whole.cpu - watch.cpu, whole.wall - watch.wall)
    return Seconds(watch.cpu, watch.wall), rest, finished.cohort.num_host_epochs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the row of 31, and one episode alone."""
    chosen = options(__doc__ or "", rounds=3, arguments=arguments)
    digits = cases.case("8/16/32 at 1x8x8").environment(50)
    size = {"task": digits.task, "host": digits.host, "batches_per_epoch": 50, "horizon": 12}
    row = row_of_31(behaviours=2, **TINY) if chosen.quick else row_of_31(**size)
    run(row_of_31(behaviours=1, **TINY))  # warm up
    records = []
    for plan in (row, alone(row)[0]):
        runs = [run(plan) for _ in range(chosen.rounds)]
        epochs = runs[0][2]
        compared = Comparison(
            tuple(Seconds(ALLOWED_SHARE * work.cpu, ALLOWED_SHARE * work.wall).part(epochs) for work, _, _ in runs),
            tuple(rest.part(epochs) for _, rest, _ in runs),
        )
        count = len(plan.episodes)
        case = f"{count} episode{'s' if count > 1 else ''}, 5 % of the engine's work"
        record = compared.record(NAME, case, "CPU ms per host epoch", per=1e3, host_epochs=epochs)
        record["share_percent"] = 100 * ALLOWED_SHARE / float(str(record["ratio"]))
        records.append(record)
        show(record)
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
