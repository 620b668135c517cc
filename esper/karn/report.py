"""The report: one self-contained HTML page about a sealed version, a run's events and an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from esper.karn import comparison_table as tables
from esper.karn import report_data as data
from esper.karn import report_figures as figures
from esper.karn import verdict_text as health
from esper.karn.overrides import overrides_of
from esper.karn.store import Version
from esper.leyline.comparison import ArmResult, BestFixed, ControlResult, Evaluation
from esper.leyline.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image with what it shows in words."""

    uri: str
    alt: str
    title: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One environment's part of the evaluation; `groups` says what the arms of the first table are."""

    environment: str
    tables: list[tables.TextTable]
    groups: list[str]
    findings: list[str]
    pictures: list[Picture]


def build_report(version: Version, *, evaluation: Evaluation | None, events: Path, out: Path) -> Path:
    """Write the report and return its path; the page loads nothing from anywhere else.

    Args:
        version: The sealed version that it is about; cohorts, actions and counts are read from it.
        evaluation: The comparison, None where there is none yet.
        events: The run's folder, with its `events-*.jsonl`; without any there are no learning curves.
        out: The file to write; folders are made.

    Raises:
        StoreError: It cannot be written.
    """
    html = render(version, evaluation, data.read_telemetry(events))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the report to {out}: {error.strerror}") from None
    return out


def render(version: Version, evaluation: Evaluation | None, telemetry: data.Telemetry) -> str:
    """Return the page as a string."""
    engine = Environment(
        loader=PackageLoader("esper.karn", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    verdict = version.verdict()
    manifest = version.manifest
    page: dict[str, Any] = {
        "ref": version.ref,
        "manifest": manifest,
        "facts": _facts(version, telemetry, evaluation),
        "counts": data.read_counts(version),
        "verdict": verdict,
        "uses": [] if verdict is None else list(health.levels(verdict).items()),
        "checks": [] if verdict is None else [health.check_row(check) for check in health.sorted_checks(verdict)],
        "overrides": health.override_lines(overrides_of(version)),
        "curves": [_curve_panels(policy, metrics) for policy, metrics in telemetry.curves.items()],
        "num_unreadable": telemetry.num_unreadable,
        "traces": [_trace_picture(cohort) for cohort in data.read_traces(version)],
        "shares": [
            _shares_picture(environment, shares) for environment, shares in data.read_action_shares(version).items()
        ],
        "evaluation": evaluation,
        "comparisons": [] if evaluation is None else _comparisons(version, evaluation),
        "controls": [] if evaluation is None else [_control_row(control) for control in evaluation.controls],
        "failed_controls": () if evaluation is None else evaluation.failed_controls,
    }
    return engine.get_template("report.html.j2").render(page)


def _facts(version: Version, telemetry: data.Telemetry, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """What ran, as (name, value); what was not recorded says so."""
    manifest, work = version.manifest, data.read_work(version)
    matrix = manifest.provenance.get("matrix")
    name = matrix.get("name") if isinstance(matrix, dict) else None
    machine = manifest.provenance.get("machine")
    words = ", ".join(_machine_word(*item) for item in machine.items()) if isinstance(machine, dict) else machine
    ratio = f" (shared {work.epochs_asked / work.epochs_computed:.2f}-fold)" if work.epochs_computed else ""
    counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in sorted(manifest.counts.items()))
    facts = [
        ("dataset", f"{version.ref}, sealed {manifest.created_at}"),
        ("digest", manifest.digest),
        ("matrix", f"{name} ({manifest.matrix_id})" if name else manifest.matrix_id),
        ("holds", counts),
        ("machine", str(words) if words else "not recorded"),
        ("code commit", ", ".join(manifest.code_commits) or "not recorded"),
        ("host epochs", f"{work.epochs_asked:,} asked for, {work.epochs_computed:,} computed{ratio}"),
        (
            "CPU time",
            f"{_duration(work.cpu_s_shared)} for these episodes; {_duration(work.cpu_s_alone)} had each run alone",
        ),
        ("wall-clock time", "not recorded" if telemetry.wall_s is None else _duration(telemetry.wall_s)),
    ]
    if evaluation is not None:
        level = "never checked" if evaluation.verdict is None else evaluation.verdict.value
        facts.append(("evaluated", f"{evaluation.created_at}, in {_duration(evaluation.wall_s)}"))
        facts.append(("policies from", f"{evaluation.dataset}@{evaluation.version} (offline RL: {level})"))
    return facts


def _machine_word(name: str, value: object) -> str:
    units = {"cores": "{} cores", "python": "Python {}"}
    return units.get(name, "{}").format(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _control_row(control: ControlResult) -> dict[str, str]:
    def text(value: float) -> str:
        return tables.number(value, 0 if float(value).is_integer() else 1)

    return {
        "environment": control.environment,
        "name": control.name,
        "value": text(control.value),
        "range": f"{text(control.low)} … {text(control.high)}",
        "level": "pass" if control.passed else "fail",
    }


def _comparisons(version: Version, evaluation: Evaluation) -> list[Comparison]:
    found = []
    for environment in tables.environments(evaluation):
        arms = tables.drawn_arms_of(evaluation, environment)
        best = next((best for best in evaluation.best_fixed if best.environment == environment), None)
        found.append(
            Comparison(
                environment=environment,
                tables=tables.tables_of(evaluation, environment),
                groups=[arm.group for arm in tables.single_arms_of(evaluation, environment)],
                findings=[*_control_findings(arms, best), *tables.findings(evaluation, environment)],
                pictures=_comparison_pictures(environment, arms, _rent_points(version, environment)),
            )
        )
    return found


def _control_findings(arms: list[ArmResult], best: BestFixed | None) -> list[str]:
    """What the controls alone say: whether growth pays at all here, and against networks that never grew."""
    by_name = {arm.arm: arm for arm in arms}
    sentences = []
    if best is not None and "best-fixed" in by_name:
        gain = by_name["best-fixed"].gain_over["never-act"]
        pays = "growth pays" if gain.low > 0 else "growth costs" if gain.high < 0 else "growth has no clear effect"
        mean, low, high = (tables.number(value, 1, signed=True) for value in (gain.mean, gain.low, gain.high))
        sentences.append(
            f"Over never acting, the best fixed schedule ({best.description}) gains {mean} test points "
            f"[{low}, {high}]: {pays} here."
        )
    for name, words in (("bigger", "the bigger network from scratch"), ("wider", "the wider host")):
        if name in by_name and "best-fixed" in by_name[name].gain_over:
            gain = by_name[name].gain_over["best-fixed"]
            result = "is better than" if gain.low > 0 else "is worse than" if gain.high < 0 else "ties with"
            number = tables.number(gain.mean, 1, signed=True)
            sentences.append(f"In test accuracy {words} {result} the best fixed schedule ({number} points).")
    return sentences


def _rent_points(version: Version, environment: str) -> float | None:
    rewards = version.manifest.provenance.get("rewards")
    reward = rewards.get(environment) if isinstance(rewards, dict) else None
    rent = reward.get("rent_points") if isinstance(reward, dict) else None
    return float(rent) if isinstance(rent, int | float) else None


def _comparison_pictures(environment: str, arms: list[ArmResult], rent_points: float | None) -> list[Picture]:
    gains = "; ".join(
        f"{arm.arm} {tables.number(arm.gain_over['never-act'].mean, 1, signed=True)} at ×{arm.growth_factor:.2f}"
        for arm in arms
        if "never-act" in arm.gain_over
    )
    pictures = [
        Picture(
            uri=figures.frontier_figure(arms, rent_points),
            alt=f"Frontier on {environment}, gain over never-act in points against growth: {gains}.",
            title="Gain against parameters added",
            note="Above the dashed line a gain is worth more than the rent on its parameters." if rent_points else "",
        )
    ]
    for reference in tables.REFERENCES:
        returns = "; ".join(
            f"{arm.arm} {tables.number(arm.return_over[reference].mean, 2, signed=True)}"
            for arm in arms
            if reference in arm.return_over
        )
        pictures.append(
            Picture(
                uri=figures.forest_figure(arms, reference),
                alt=f"Paired return differences to {reference} on {environment}: {returns}.",
                title=f"Return over {reference}",
                note="Mean and 95 % interval. An interval that holds 0 decides nothing.",
            )
        )
    return pictures


def _curve_panels(policy: str, metrics: Mapping[str, list[tuple[float, float]]]) -> tuple[str, list[Picture], int]:
    """The policy, a picture per metric, and how many metrics are left out."""
    shown = list(metrics)[: figures.MAX_METRICS]
    panels = [
        Picture(
            uri=figures.curve_figure(name, metrics[name]),
            alt=(
                f"{policy}: {name.replace('_', ' ')} from {metrics[name][0][1]:.3g} to {metrics[name][-1][1]:.3g} "
                f"over {len(metrics[name])} logged steps."
            ),
            title=name,
        )
        for name in shown
    ]
    return policy, panels, len(metrics) - len(shown)


def _trace_picture(cohort: data.CohortTrace) -> Picture:
    end = f"{100 * cohort.trunk[-1]:.1f} %" if cohort.trunk else "nothing"
    outcomes = [100 * episode.outcome for episode in cohort.episodes]
    reach = (
        f"committed networks end between {min(outcomes):.1f} and {max(outcomes):.1f} %" if outcomes else "no episode"
    )
    return Picture(
        uri=figures.trace_figure(cohort),
        alt=(
            f"Validation accuracy by epoch in one cohort of {cohort.environment}: the trunk ends at {end}, {reach}; "
            f"{len(cohort.episodes)} episodes on {cohort.num_lineages} lineages."
        ),
        title=f"{cohort.environment}, {cohort.role}",
        note=(
            f"{len(cohort.episodes)} episodes on {cohort.num_lineages} lineages (environment seed {cohort.env_seed}); "
            f"{reach}."
        ),
    )


def _shares_picture(environment: str, shares: dict[str, dict[str, float]]) -> Picture:
    waits = "; ".join(f"{name} waits {100 * ops['WAIT']:.0f} %" for name, ops in shares.items())
    return Picture(
        uri=figures.shares_figure(shares),
        alt=f"Share of each operation by controller on {environment}: {waits}.",
        title=environment,
    )
