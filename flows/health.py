"""Health: check a sealed version, store its verdict, write its page, and tell who must know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper.karn.store import open_store
from esper.karn.verdict_text import check_row, levels, sorted_checks
from esper.karn.versions import Version
from esper.leyline.errors import HealthError
from esper.leyline.events import EventKind
from esper.leyline.verdict import Level, Use, Verdict
from flows.artifacts import artifact_key, publish, publish_places
from flows.automations import announce_verdict
from flows.context import Context, RunOptions, open_context
from flows.notify import notify_blocked
from flows.orchestration import Orchestrator, under_prefect
from flows.versions import rewards_of


class HealthRequest(RunOptions):
    """Check `NAME` or `NAME@n`."""

    dataset: str

    def check(self) -> None:
        """Raise where the version does not exist."""
        open_store(self.store).resolve(self.dataset)


@dataclass(frozen=True)
class Checked:
    """A verdict, stored with its version, the folder of its Data Docs and its page."""

    version: Version
    verdict: Verdict
    docs: Path
    page: Path


def run_health(request: HealthRequest, orchestrator: Orchestrator) -> Checked:
    """Check a version and store the verdict, whatever it is."""
    version = open_store(request.store).resolve(request.dataset)
    with open_context(request, version.name, "health", orchestrator, events={"version": version.ref}) as context:
        checked = check_health(context, version)
        announce_verdict(version, checked.verdict, context.store, orchestrator)
        return checked


def check_health(context: Context, version: Version) -> Checked:
    """Check a version and store the verdict; Data Docs and page lie under `health` in the run's folder.

    Under Prefect the verdict and the places of its pages are artifacts of the flow run. Where it blocks a use, the
    webhook is told.
    """
    from esper.karn.health_page import build_health_page  # draws with matplotlib
    from quality.checking import DOCS_INDEX, check  # seconds of imports that other flows do not need
    from quality.rows import ROW_CHECKS

    context.progress.begin("health", 1)
    folder = context.folder / "health"
    docs = folder / version.ref
    rewards = rewards_of(version)
    verdict = check(version, docs_dir=docs, rewards=rewards)
    version.write_verdict(verdict)
    told = levels(verdict)
    page = build_health_page(
        version,
        verdict,
        rewards=rewards,
        docs=docs / DOCS_INDEX,
        out=folder / f"{version.ref}.html",
        row_checks=ROW_CHECKS,
    )
    context.events.emit(EventKind.HEALTH_CHECKED, {"version": version.ref, **told})
    context.progress.advance("health", ", ".join(f"{use} {level}" for use, level in told.items()))
    is_shown = under_prefect(context.orchestrator)
    if is_shown:
        _publish(verdict, page)
        publish_places(version.ref, {"health page": page, "Data Docs": docs / DOCS_INDEX})
    notify_blocked(verdict, page, under_prefect=is_shown)
    return Checked(version, verdict, docs, page)


def _publish(verdict: Verdict, page: Path) -> None:
    """Show the verdict as an artifact of the current flow run."""
    publish(
        artifact_key("health", verdict.dataset, verdict.version),
        verdict_markdown(verdict, page),
        f"Health of {verdict.dataset}@{verdict.version}",
    )


def verdict_markdown(verdict: Verdict, page: Path) -> str:
    """Return the verdict as Markdown: the level of each use, then every check that blocks or warns."""
    uses = "\n".join(f"- {use}: **{level}**" for use, level in levels(verdict).items())
    rows = [check_row(check) for check in sorted_checks(verdict)]
    fired = [row for row in rows if row.level in ("block", "warn")]
    passed = sum(row.level == "pass" for row in rows)
    lines = [
        "| "
        + " | ".join(
            _cell(text)
            for text in (row.level, row.name, row.environment, row.value, row.thresholds, f"{row.message} {row.remedy}")
        )
        + " |"
        for row in fired
    ]
    head = "| level | check | environment | value | limits | what to do |\n|---|---|---|---:|---|---|\n"
    table = head + "\n".join(lines) if fired else "Nothing blocks and nothing warns."
    return (
        f"# Health of {verdict.dataset}@{verdict.version}\n\n{uses}\n\n{table}\n\n"
        f"{passed} checks pass. Page: `{page}`\n\nChecked {verdict.checked_at}, digest `{verdict.digest}`\n"
    )


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table: no line ends, no bars, nothing that is read as HTML."""
    flat = " ".join(text.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def require_offline_rl(verdict: Verdict) -> None:
    """Raise HealthError where the verdict blocks offline RL; the message names the checks."""
    if verdict.level(Use.OFFLINE_RL) is not Level.BLOCK:
        return
    blocking = [check for check in verdict.checks if check.level is Level.BLOCK and Use.OFFLINE_RL in check.uses]
    lines = "\n".join(f"  {check.environment}: {check.name}: {check.message}; {check.remedy}" for check in blocking)
    raise HealthError(f"{verdict.dataset}@{verdict.version} is blocked for offline RL\n{lines}")
