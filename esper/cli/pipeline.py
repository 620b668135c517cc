"""`esper pipeline`: from a matrix to a report in one command."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from esper.cli.launch import default_workers, launch


def pipeline(
    name: str = "demo",
    /,
    *,
    matrix: str | None = None,
    store: str | None = None,
    workers: int | None = None,
    no_prefect: Annotated[bool, Parameter(negative="")] = False,
    run_name: str | None = None,
) -> None:
    """Generate data, check it, train and fine-tune controllers, compare them with every control, write the report.

    Exits with 3 where the data are blocked for offline RL, with 1 where a positive or negative control fails.
    What the store holds already is not run again, so the same command goes on after an interruption.

    Args:
        name: Name of a pipeline, or a TOML file.
        matrix: Name of a matrix, or a TOML file, in place of the pipeline's own.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        workers: Worker processes (default: one per core); 0 runs in this process.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from esper.cli.comparison import print_comparison
    from flows.evaluation import require_controls
    from flows.pipeline import PipelineRequest, run_pipeline

    request = PipelineRequest.parse(
        {
            "pipeline": name,
            "matrix": matrix,
            "store": store,
            "workers": default_workers() if workers is None else workers,
            "run_name": run_name,
        },
        "esper pipeline",
    )
    result = launch("pipeline", request, run_pipeline, prefect=not no_prefect)
    print_comparison(result.evaluation)
    if result.generated.ratio is not None:
        print(f"host epochs, each episode alone / computed: {result.generated.ratio:.2f}")
    print(f"dataset: {result.version.ref}")
    print(f"report: {result.report}")
    require_controls(result.evaluation)
