"""Peak memory and cost per episode as a cohort grows from 1 to 64 episodes, as records and as a plot.

Every size runs in a process of its own. Memory is what the process held at most beyond what it held before the cohort;
cost is the cohort's CPU time, divided among its episodes. The ratio is the cost of an episode alone to that of one in
the cohort.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.common import Record, Seconds, options, show, since, started, summary, write
from benchmarks.plans import TINY, row_of_31
from esper.leyline.matrix import CohortPlan

NAME = "growth"

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "growth-of-cohorts.png"

SIZES = (1, 2, 4, 8, 16, 32, 64)


def plan_of(num_episodes: int, quick: bool) -> CohortPlan:
    """Return a cohort of so many episodes: the row of 31, three times with other draws, cut to the size."""
    row = row_of_31(**(TINY if quick else {}))
    again = [
        episode.model_copy(update={"repetition": repetition}) for repetition in range(3) for episode in row.episodes
    ]
    return row.model_copy(update={"episodes": tuple(again[:num_episodes])})


def cost(num_episodes: int, quick: bool) -> tuple[Seconds, int, float]:
    """Run a cohort; return its time, its host epochs and by how many MB the process's peak memory rose."""
    from esper.tolaria.rollout import CohortRun
    from esper.tolaria.runtime import single_thread

    single_thread()
    CohortRun.of(row_of_31(behaviours=1, **TINY)).recorder.tables("warm up")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, started()
    run = CohortRun.of(plan_of(num_episodes, quick))
    run.recorder.tables("benchmark")
    took = since(start)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return took, run.cohort.num_host_epochs, kilobytes / 1024


def measure(num_episodes: int, quick: bool) -> tuple[Seconds, int, float]:
    """Do it in a fresh process; in this one at the smallest size, which measures nothing."""
    if quick:
        return cost(num_episodes, quick)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(cost, num_episodes, quick).result()


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw cost per episode, host epochs per episode and peak memory over the size of the cohort."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = (
        ("esper", "CPU seconds per episode"),
        ("host_epochs_per_episode", "host epochs per episode"),
        ("peak_megabytes", "peak MB above the idle process"),
    )
    sizes = [int(str(record["episodes"])) for record in records]
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels):
        axes.plot(sizes, [float(str(record[key])) for record in records], marker="o")
        axes.set(xscale="log", xlabel="episodes in the cohort", title=label, xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every size once a round and draw the plot."""
    chosen = options(__doc__ or "", rounds=1, arguments=arguments)
    sizes = SIZES[:2] if chosen.quick else SIZES
    rounds = [{size: measure(size, chosen.quick) for size in sizes} for _ in range(chosen.rounds)]
    records: list[Record] = []
    for size in sizes:
        per_episode = [found[size][0].cpu / size for found in rounds]
        record = summary(
            NAME,
            f"cohort of {size}",
            [found[1][0].cpu / mine for found, mine in zip(rounds, per_episode)],
            "CPU s per episode",
            reference=sorted(found[1][0].cpu for found in rounds)[len(rounds) // 2],
            esper=sorted(per_episode)[len(rounds) // 2],
            episodes=size,
            host_epochs_per_episode=rounds[0][size][1] / size,
            peak_megabytes=max(found[size][2] for found in rounds),
        )
        records.append(record)
        show(record)
    write(NAME, records, chosen.output)
    plot(records, chosen.output / IMAGE.name if chosen.quick else IMAGE)


if __name__ == "__main__":
    main()
