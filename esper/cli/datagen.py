"""`esper datagen`: generate the episodes of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from esper.cli.launch import launch, workers_for
from esper.cli.output import note, note_verdict
from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from flows.datagen import DatagenRequest, Generated
    from flows.planning import Selection

FAILED_QUERY = "select environment, env_seed, error from episodes where outcome = 'failed'"

Flag = Annotated[bool, Parameter(negative="")]
Several = Parameter(consume_multiple=True)


def datagen(
    *,
    matrix: str | None = None,
    store: str | None = None,
    output_dir: str | None = None,
    dataset: str | None = None,
    workers: int | None = None,
    devices: Annotated[list[str] | None, Several] = None,
    numerics: str | None = None,
    max_lineages: int | None = None,
    pool: str | None = None,
    batch_size: int | None = None,
    env_ids: Annotated[list[str] | None, Several] = None,
    policy_ids: Annotated[list[str] | None, Several] = None,
    epsilons: Annotated[list[float] | None, Several] = None,
    episodes_per_combo: int | None = None,
    max_epochs: int | None = None,
    dry_run: Flag = False,
    memory: Flag = False,
    skeleton: Flag = False,
    retry_failed: Flag = False,
    health_check: Flag = False,
    no_health: Flag = False,
    no_prefect: Flag = False,
    run_name: str | None = None,
) -> None:
    """Generate the episodes of a matrix and seal them as a version.

    What the store holds already is not run again, so the same command goes on after an interruption. Exit code 1
    where a planned episode has failed: everything else is stored and sealed by then.

    Args:
        matrix: Name of a matrix, or a TOML file.
        store: Folder of the datasets, or s3://BUCKET/PREFIX (default: $ESPER_STORE, else datasets/local).
        output_dir: Another name of --store.
        dataset: Name of the dataset (default: the matrix's name; NAME-skeleton with --skeleton).
        workers: Worker processes (default: one per core, or one per device); 0 runs in this process.
        devices: What each worker computes on: `cuda:0 cuda:1`, `cpu cpu`; naming a GPU twice gives it two workers.
        numerics: cpu-fp32, cuda-fp32, cuda-tf32 or cuda-bf16, in place of the environments' own (default: cuda-fp32
            on GPUs). Other numerics make other environments (other ids, the same environment seeds).
        max_lineages: Most lineages that a worker trains at once: bounds its memory, changes no row.
        pool: Name of a Prefect work pool: its workers run the cohorts, on whatever machine they are (`esper serve`).
        batch_size: Cohorts that a worker of the pool gets at a time (default: about a minute's).
        env_ids: Only these environments of the matrix, or members of its families.
        policy_ids: Only these behaviours; `schedule-sampler` stands for the explorers, `trials` for the trials.
        epsilons: These epsilons instead of the matrix's.
        episodes_per_combo: Episodes of each environment, behaviour and epsilon instead of the matrix's replicates.
        max_epochs: Shorten the horizon (another environment id: for trying out).
        dry_run: Print what would run, hours and bytes it takes, and where these figures come from; run nothing.
        memory: With --dry-run, print too what a worker holds at most (loads torch).
        skeleton: Make the episodes up: real behaviours, masks, lifecycles and rows, but no host is trained. For trying
            out what comes after; nothing learns from them.
        retry_failed: Run episodes again that are stored as failed, once.
        health_check: Run nothing; check the newest version of the dataset and store its verdict.
        no_health: Leave the version unchecked; `esper health` does it later.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from flows.datagen import DatagenRequest, run_datagen

    where = _one_of(store, output_dir)
    if health_check:
        _refuse_beside_check(
            {
                "--no-health": no_health,
                "--dry-run": dry_run,
                "--memory": memory,
                "--skeleton": skeleton,
                "--retry-failed": retry_failed,
                "--workers": workers,
                "--devices": devices,
                "--numerics": numerics,
                "--max-lineages": max_lineages,
                "--pool": pool,
                "--batch-size": batch_size,
                "--env-ids": env_ids,
                "--policy-ids": policy_ids,
                "--epsilons": epsilons,
                "--episodes-per-combo": episodes_per_combo,
                "--max-epochs": max_epochs,
            }
        )
        _check_newest(matrix, dataset, where, run_name)
        return
    if memory and not dry_run:
        raise SpecError("--memory is printed by --dry-run\n  add --dry-run, or leave --memory out")
    request = DatagenRequest.parse(
        {
            "matrix": _named(matrix),
            "store": where,
            "dataset": dataset,
            "workers": workers_for(workers, devices),
            "devices": devices,
            "numerics": numerics,
            "max_lineages": max_lineages,
            "pool": pool,
            "batch_size": batch_size,
            "selection": _selection(env_ids, policy_ids, epsilons, episodes_per_combo, max_epochs),
            "skeleton": skeleton,
            "retry_failed": retry_failed,
            "health": not no_health,
            "run_name": run_name,
        },
        "esper datagen",
    )
    if pool is not None:
        _refuse_beside_pool(pool, workers=workers, no_prefect=no_prefect)
    if dry_run:
        _preview(request, memory=memory)
        return
    _print_generated(launch("datagen", request, run_datagen, prefect=not no_prefect), skeleton=skeleton)


def _one_of(store: str | None, output_dir: str | None) -> str | None:
    if store is not None and output_dir is not None:
        raise SpecError("--store and --output-dir are one option by two names\n  give one of them")
    return output_dir if store is None else store


def _named(matrix: str | None) -> str:
    if matrix is None:
        from esper.leyline.library import names

        raise SpecError(
            f"no matrix is named\n  expected: --matrix with one of {', '.join(names('matrices'))}, or a file"
        )
    return matrix


def _selection(
    env_ids: list[str] | None,
    policy_ids: list[str] | None,
    epsilons: list[float] | None,
    episodes_per_combo: int | None,
    max_epochs: int | None,
) -> Selection | None:
    from flows.planning import Selection

    given = {
        "environments": env_ids,
        "behaviours": policy_ids,
        "epsilons": epsilons,
        "episodes_per_combo": episodes_per_combo,
        "max_epochs": max_epochs,
    }
    return None if all(value is None for value in given.values()) else Selection.parse(given, "esper datagen")


def _preview(request: DatagenRequest, *, memory: bool) -> None:
    from esper.cli.datagen_preview import print_memory, print_preview
    from esper.tolaria.workers import check_device_names
    from flows.preview import preview

    check_device_names(request.devices or ())  # the GPUs may be those of another machine
    request.check()
    seen = preview(request)
    print_preview(seen)
    if memory:
        print_memory(seen.memory(), request.workers)
    print("nothing was run; the same command without --dry-run runs it")


def _refuse_beside_pool(pool: str, *, workers: int | None, no_prefect: bool) -> None:
    if no_prefect:
        raise SpecError(f"--pool {pool} needs Prefect\n  leave --no-prefect out, and start `esper serve` first")
    if workers is not None:
        raise SpecError(
            f"--workers {workers} are processes of this machine, and the workers of pool {pool} run the cohorts\n"
            "  give one of them; `esper serve` says how many workers a machine has"
        )


def _refuse_beside_check(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise SpecError(f"--health-check checks what is there, and {name} is about a run\n  give one of them")


def _check_newest(matrix: str | None, dataset: str | None, store: str | None, run_name: str | None) -> None:
    """Check the newest version of a dataset, as `esper health` does."""
    if dataset is None:
        from esper.leyline.library import load
        from esper.leyline.matrix import MatrixSpec

        dataset = load("matrices", _named(matrix), MatrixSpec).name
    from esper.cli.health import health

    health(dataset, store=store, run_name=run_name)


def _print_generated(result: Generated, *, skeleton: bool) -> None:
    from flows.failures import GenerationError

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
    if skeleton:
        note("made up    no host was trained: training, ope, evaluate and pipeline refuse this dataset")
    note_verdict(version)
    failed = sum(result.progress["failed"].to_pylist())  # by earlier runs too
    if failed:
        raise GenerationError(
            f"{failed:,} of the planned episodes failed; the rest is stored, sealed as {version.ref}\n"
            f'  their rows say why: esper sql "{FAILED_QUERY}" --dataset {version.ref}\n'
            "  --retry-failed runs them once more"
        )
    print(f"next: esper health {version.ref}")
