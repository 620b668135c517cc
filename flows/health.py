"""Health: check a sealed version and store its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import HealthError
from esper.leyline.events import EventKind
from esper.leyline.verdict import Level, Use, Verdict
from flows.context import Context, RunOptions, open_context
from flows.orchestration import Orchestrator
from flows.versions import rewards_of


class HealthRequest(RunOptions):
    """Check `NAME` or `NAME@n`."""

    dataset: str

    def check(self) -> None:
        """Raise where the version does not exist."""
        open_store(self.store).resolve(self.dataset)


@dataclass(frozen=True)
class Checked:
    """A verdict, stored with its version, and the folder of its Data Docs."""

    version: Version
    verdict: Verdict
    docs: Path


def run_health(request: HealthRequest, orchestrator: Orchestrator) -> Checked:
    """Check a version and store the verdict, whatever it is."""
    version = open_store(request.store).resolve(request.dataset)
    with open_context(request, version.name, "health", orchestrator, events={"version": version.ref}) as context:
        return check_health(context, version)


def check_health(context: Context, version: Version) -> Checked:
    """Check a version and store the verdict; the Data Docs lie in the run's folder."""
    from quality.checking import check  # 5 seconds of imports that other flows do not need

    context.progress.begin("health", 1)
    docs = context.folder / "health" / version.ref
    verdict = check(version, docs_dir=docs, rewards=rewards_of(version))
    version.write_verdict(verdict)
    levels = {use.value: verdict.level(use).value for use in Use}
    context.events.emit(EventKind.HEALTH_CHECKED, {"version": version.ref, **levels})
    context.progress.advance("health", ", ".join(f"{use} {level}" for use, level in levels.items()))
    return Checked(version, verdict, docs)


def require_offline_rl(verdict: Verdict) -> None:
    """Raise HealthError where the verdict blocks offline RL; the message names the checks."""
    if verdict.level(Use.OFFLINE_RL) is not Level.BLOCK:
        return
    blocking = [check for check in verdict.checks if check.level is Level.BLOCK and Use.OFFLINE_RL in check.uses]
    lines = "\n".join(f"  {check.environment}: {check.name}: {check.message}; {check.remedy}" for check in blocking)
    raise HealthError(f"{verdict.dataset}@{verdict.version} is blocked for offline RL\n{lines}")
