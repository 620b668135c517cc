"""`esper report`: one self-contained page about a run."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from esper.cli.launch import launch
from esper.cli.output import note_verdict


def report(
    dataset: str,
    /,
    *,
    store: str | None = None,
    run_name: str | None = None,
    no_prefect: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the HTML report of a run: what ran, the verdict, learning curves, traces, the comparison.

    Args:
        dataset: NAME or NAME@n.
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
        run_name: The run (default: the newest with a comparison).
        no_prefect: Run in process, without a Prefect server.
    """
    from esper.karn.store import open_store
    from flows.report import ReportRequest, run_report

    request = ReportRequest.parse({"dataset": dataset, "store": store, "run_name": run_name}, "esper report")
    note_verdict(open_store(store).resolve(dataset))
    print(f"report: {launch('report', request, run_report, prefect=not no_prefect)}")
