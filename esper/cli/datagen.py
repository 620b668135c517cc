"""`esper datagen`: generate the episodes of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from esper.cli.launch import launch, workers_for
from esper.cli.output import note_verdict

if TYPE_CHECKING:
    from esper.tolaria.memory import MemoryBound
    from flows.datagen import Generated
    from flows.planning import Estimate, Selection

FAILED_QUERY = "select environment, env_seed, error from episodes where outcome = 'failed'"


def datagen(
    *,
    matrix: str,
    store: str | None = None,
    dataset: str | None = None,
    workers: int | None = None,
    devices: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    numerics: str | None = None,
    max_lineages: int | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    env_ids: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    policy_ids: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    epsilons: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    max_epochs: int | None = None,
    retry_failed: Annotated[bool, Parameter(negative="")] = False,
    no_health: Annotated[bool, Parameter(negative="")] = False,
    no_prefect: Annotated[bool, Parameter(negative="")] = False,
    run_name: str | None = None,
) -> None:
    """Generate the episodes of a matrix and seal them as a version.

    What the store holds already is not run again, so the same command goes on after an interruption.

    Args:
        matrix: Name of a matrix, or a TOML file.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        dataset: Name of the dataset (default: the matrix's name).
        workers: Worker processes (default: one per core, or one per device); 0 runs in this process.
        devices: What each worker computes on: `cuda:0 cuda:1`, `cpu cpu`; naming a GPU twice gives it two workers.
        numerics: cpu-fp32, cuda-fp32, cuda-tf32 or cuda-bf16, in place of the environments' own (default: cuda-fp32
            on GPUs). Other numerics make other environments (other ids, the same environment seeds).
        max_lineages: Most lineages that a worker trains at once: bounds its memory, changes no row.
        dry_run: Print what would run and what it costs; run nothing.
        env_ids: Only these environments of the matrix.
        policy_ids: Only these behaviours (`schedule-sampler` for the explorers).
        epsilons: These epsilons instead of the matrix's.
        max_epochs: Shorten the horizon (another environment id: for trying out).
        retry_failed: Run episodes again that are stored as failed.
        no_health: Leave the version unchecked; `esper health` does it later.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from flows.datagen import DatagenRequest, estimate_datagen, run_datagen, worker_memory

    request = DatagenRequest.parse(
        {
            "matrix": matrix,
            "store": store,
            "dataset": dataset,
            "workers": workers_for(workers, devices),
            "devices": devices,
            "numerics": numerics,
            "max_lineages": max_lineages,
            "selection": _selection(env_ids, policy_ids, epsilons, max_epochs),
            "retry_failed": retry_failed,
            "health": not no_health,
            "run_name": run_name,
        },
        "esper datagen",
    )
    if dry_run:
        request.check_devices()
        _print_estimate(estimate_datagen(request))
        _print_memory(worker_memory(request), request.workers)
        print("nothing was run; the same command without --dry-run runs it")
        return
    _print_generated(launch("datagen", request, run_datagen, prefect=not no_prefect))


def _selection(
    env_ids: list[str] | None, policy_ids: list[str] | None, epsilons: list[float] | None, max_epochs: int | None
) -> Selection | None:
    from flows.planning import Selection

    if all(given is None for given in (env_ids, policy_ids, epsilons, max_epochs)):
        return None
    return Selection.parse(
        {"environments": env_ids, "behaviours": policy_ids, "epsilons": epsilons, "max_epochs": max_epochs},
        "esper datagen",
    )


def _print_estimate(estimate: Estimate) -> None:
    ratio = estimate.measured_ratio
    print(f"episodes                           {estimate.episodes:>10,}")
    if estimate.branches:
        print(f"  of them branches                 {estimate.branches:>10,}")
    print(f"cohorts                            {estimate.cohorts:>10,}")
    print(f"host epochs, each episode alone    {estimate.alone_epochs:>10,}")
    print(f"host epochs at the least (trunks)  {estimate.least_epochs:>10,}")
    print(f"alone / computed, newest run       {f'{ratio:.2f}' if ratio else 'not run yet':>10}")
    if ratio:
        print(f"host epochs at that ratio          {round(estimate.alone_epochs / ratio):>10,}")


def _print_memory(memory: MemoryBound, workers: int) -> None:
    print(f"memory of a worker, at most, MB    {memory.total_bytes / 1e6:>10,.0f}   (x {max(1, workers)} workers)")
    print("  tensors alone; the process with its libraries comes on top")
    print(f"  task data                        {memory.data_bytes / 1e6:>10,.0f}")
    print(f"  lineages                         {memory.lineages_bytes / 1e6:>10,.0f}   ({memory.num_lineages} at once)")
    print(f"  snapshots to branch from         {memory.snapshots_bytes / 1e6:>10,.0f}")
    print(f"  activations of one batch         {memory.batch_bytes / 1e6:>10,.0f}")


def _print_generated(result: Generated) -> None:
    version = result.version
    print(f"dataset    {version.ref}   digest {version.manifest.digest[:16]}")
    print(f"episodes   {result.new_episodes:,} new, {result.failed_episodes:,} failed")
    if result.ratio is not None:
        print(
            f"epochs     {result.alone_epochs:,} if each episode ran alone, {result.computed_epochs:,} computed: "
            f"ratio {result.ratio:.2f}"
        )
    if not result.sealed:
        print("everything planned was there already; no new version was sealed")
    if result.failed_episodes:
        print(f'failed     their rows say why: esper sql "{FAILED_QUERY}" --dataset {version.ref}')
        print("           --retry-failed runs them again")
    note_verdict(version)
    print(f"next: esper health {version.ref}")
