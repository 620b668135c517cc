"""What `esper datagen --dry-run` prints: the plan, what it takes, and where these figures come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper.cli.output import note, rich_table

if TYPE_CHECKING:
    import pyarrow as pa

    from esper.tolaria.memory import MemoryBound
    from flows.preview import EnvironmentCost, Preview

HOUR_S = 3600.0


def print_preview(preview: Preview) -> None:
    """Print the sums, what each environment takes, and the episodes of every cell."""
    estimate, ratio = preview.estimate, preview.estimate.measured_ratio
    print(f"episodes                           {estimate.episodes:>10,}")
    if estimate.branches:
        print(f"  of them branches                 {estimate.branches:>10,}")
    print(f"cohorts                            {estimate.cohorts:>10,}")
    print(f"host epochs, each episode alone    {estimate.alone_epochs:>10,}")
    print(f"host epochs at the least (trunks)  {estimate.least_epochs:>10,}")
    print(f"alone / computed, newest run       {f'{ratio:.2f}' if ratio else 'not run yet':>10}")
    if ratio:
        print(f"host epochs at that ratio          {round(estimate.alone_epochs / ratio):>10,}")
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        costs = [cost for cost in preview.costs if cost.device == device]
        if costs:
            hours, low, high = (
                sum(values) / HOUR_S
                for values in zip(*((cost.seconds, cost.low_s, cost.high_s) for cost in costs), strict=True)
            )
            shown = f"   ({_hours(low)} to {_hours(high)}; {_sources(costs)})"
            print(f"{name} hours, of one worker           {_hours(hours):>10}{shown}")
    print(f"bytes on disk, MB                  {sum(cost.num_bytes for cost in preview.costs) / 1e6:>10,.0f}")
    print(_by_environment(preview.costs), end="")
    print(_by_cell(preview.cells), end="")
    if any(cost.device == "cuda" and cost.source is None for cost in preview.costs):
        note("no run on a GPU was at hand when these rates were set: take GPU hours for an order of magnitude")


def print_memory(memory: MemoryBound, workers: int) -> None:
    """Print what a worker holds at most."""
    print(f"memory of a worker, at most, MB    {memory.total_bytes / 1e6:>10,.0f}   (x {max(1, workers)} workers)")
    print("  tensors alone; the process with its libraries comes on top")
    print(f"  task data                        {memory.data_bytes / 1e6:>10,.0f}")
    print(f"  lineages                         {memory.lineages_bytes / 1e6:>10,.0f}   ({memory.num_lineages} at once)")
    print(f"  snapshots to branch from         {memory.snapshots_bytes / 1e6:>10,.0f}")
    print(f"  activations of one batch         {memory.batch_bytes / 1e6:>10,.0f}")


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _sources(costs: Sequence[EnvironmentCost]) -> str:
    """Where the seconds of a host epoch come from, in words."""
    measured = sorted({cost.source for cost in costs if cost.source is not None})
    figured = sum(cost.source is None for cost in costs)
    parts = [f"as measured in {', '.join(measured)}"] if measured else []
    if figured:
        parts.append(f"{figured} of {len(costs)} environments from the operations of their hosts")
    return "; ".join(parts)


def _by_environment(costs: Sequence[EnvironmentCost]) -> str:
    names = ["environment", "cohorts", "episodes", "epochs alone", "epochs", "hours", "MB", "as measured in"]
    rows = [
        [
            cost.environment,
            cost.cohorts,
            cost.episodes,
            cost.alone_epochs,
            round(cost.epochs),
            cost.seconds / HOUR_S,
            cost.num_bytes / 1e6,
            cost.source or "nothing: from operations",
        ]
        for cost in costs
    ]
    return rich_table(names, rows)


def _by_cell(cells: pa.Table) -> str:
    """The episodes of every cell: environments and controllers down, epsilons across."""
    epsilons = sorted(set(cells["epsilon"].to_pylist()))
    counts: dict[tuple[str, str, str], dict[float, int]] = {}
    for row in cells.to_pylist():
        across = counts.setdefault((row["environment"], row["root"], row["controller"]), {})
        across[row["epsilon"]] = across.get(row["epsilon"], 0) + row["planned"]
    rows = [
        [environment, controller, *(across.get(epsilon) for epsilon in epsilons)]
        for (environment, _, controller), across in counts.items()
    ]
    return rich_table(["environment", "controller", *(f"epsilon {epsilon:g}" for epsilon in epsilons)], rows)
