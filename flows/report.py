"""The report of a run: one page about a version, the run's events and its comparison."""

from __future__ import annotations

import json
from pathlib import Path

from esper.karn.report import build_report
from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.comparison import Evaluation
from esper.leyline.errors import IntegrityError, unknown_name
from flows.artifacts import publish_places
from flows.context import Context, RunOptions
from flows.evaluation import RESULT
from flows.orchestration import Orchestrator, under_prefect

PAGE = "report.html"


class ReportRequest(RunOptions):
    """Write the report of a run on `NAME` or `NAME@n`: `run_name`, else the newest (with a comparison, if any)."""

    dataset: str

    def check(self) -> None:
        """Raise where the version does not exist."""
        open_store(self.store).resolve(self.dataset)


def write_report(context: Context, version: Version, evaluation: Evaluation | None) -> Path:
    """Write the report into the context's run folder and return its path; under Prefect the flow run names it."""
    return _build(version, evaluation, context.folder, context.orchestrator)


def run_report(request: ReportRequest, orchestrator: Orchestrator) -> Path:
    """Write the report of an earlier run again; return its path."""
    version = open_store(request.store).resolve(request.dataset)
    folder = _run_folder(version.root / "runs", request.run_name)

    def build() -> Path:
        return _build(version, _read_evaluation(folder / RESULT), folder, orchestrator)

    return orchestrator.stage("report", build)


def _build(version: Version, evaluation: Evaluation | None, folder: Path, orchestrator: Orchestrator) -> Path:
    page = build_report(version, evaluation=evaluation, events=folder, out=folder / PAGE)
    if under_prefect(orchestrator):
        publish_places(f"{version.ref} report", {"report": page})
    return page


def _run_folder(runs: Path, name: str | None) -> Path:
    folders = sorted((path for path in runs.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    if name is not None:
        if runs / name not in folders:
            raise unknown_name("run", name, [path.name for path in folders])
        return runs / name
    compared = [path for path in folders if (path / RESULT).is_file()]
    newest = (compared or folders)[-1:]
    return newest[0] if newest else runs / "report"


def _read_evaluation(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        return Evaluation.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}\n  run `esper evaluate` again") from None
