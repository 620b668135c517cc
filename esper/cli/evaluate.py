"""`esper evaluate`: policies against every control on held-out environment seeds."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from esper.cli.launch import default_workers, launch
from esper.cli.output import note_verdict


def evaluate(
    dataset: str,
    /,
    *,
    policy: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    pipeline: str = "demo",
    store: str | None = None,
    workers: int | None = None,
    no_prefect: Annotated[bool, Parameter(negative="")] = False,
    run_name: str | None = None,
) -> None:
    """Compare checkpoints with every control on the evaluation cells of a pipeline.

    Policies whose names differ in `-s0`, `-s1`, ... alone are controller seeds of one algorithm and stand as one row
    with an interval over both kinds of seeds. Episodes that the dataset holds already are not run again.

    Exits with 1 where a positive or negative control of the pipeline fails.

    Args:
        dataset: NAME or NAME@n that the policies learned from; the episodes join it with role `evaluation`.
        policy: Checkpoint folders; without any, the controls alone are compared.
        pipeline: Name of a pipeline, or a TOML file.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        workers: Worker processes (default: one per core); 0 runs in this process.
        no_prefect: Run in process, without a Prefect server.
        run_name: Name of the run's folder (default: command and time).
    """
    from esper.cli.comparison import print_comparison
    from esper.karn.store import open_store
    from flows.evaluation import EvaluateRequest, require_controls, run_evaluation

    request = EvaluateRequest.parse(
        {
            "dataset": dataset,
            "policies": policy or [],
            "pipeline": pipeline,
            "store": store,
            "workers": default_workers() if workers is None else workers,
            "run_name": run_name,
        },
        "esper evaluate",
    )
    evaluation, path = launch("evaluate", request, run_evaluation, prefect=not no_prefect)
    print_comparison(evaluation)
    note_verdict(open_store(store).resolve(dataset))
    print(f"result  {path}")
    print(f"page    {path.with_suffix('.md')}")
    require_controls(evaluation)
    print(f"next: esper report {dataset} --run-name {path.parent.name}")
