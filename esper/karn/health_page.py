"""The health page: one self-contained HTML file about what a sealed version is fit for, and why."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from esper.karn import health_page_figures as figures
from esper.karn.health_page_data import HealthPageData, read_page_data
from esper.karn.overrides import overrides_of
from esper.karn.report import Picture
from esper.karn.report_figures import shares_figure
from esper.karn.store import Version
from esper.karn.verdict_text import FIRED, USE_WORDS, check_row, override_lines, short_number, sorted_checks
from esper.leyline.errors import StoreError
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import Level, Use, Verdict


def build_health_page(
    version: Version,
    verdict: Verdict,
    *,
    rewards: Mapping[str, RewardSpec],
    docs: Path | None,
    out: Path,
    row_checks: Collection[str] = (),
) -> Path:
    """Write the page and return its path; it loads nothing from anywhere else.

    Args:
        version: The sealed version; what is drawn is read from it.
        verdict: What the checks found.
        rewards: The reward of each environment by name, as far as they are known.
        docs: First page of the Data Docs to link to, if any.
        out: The file to write; folders are made.
        row_checks: The checks whose failing rows can be listed.

    Raises:
        IntegrityError: A file of the version is missing or damaged.
        StoreError: The page cannot be written.
    """
    link = None if docs is None else quote(os.path.relpath(docs, out.parent))
    html = render(version, verdict, read_page_data(version, rewards), docs_link=link, row_checks=row_checks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the health page to {out}: {error.strerror}") from None
    return out


def render(
    version: Version, verdict: Verdict, data: HealthPageData, *, docs_link: str | None, row_checks: Collection[str] = ()
) -> str:
    """Return the page as a string."""
    engine = Environment(
        loader=PackageLoader("esper.karn", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    checks = sorted_checks(verdict)
    return engine.get_template("health_page.html.j2").render(
        ref=version.ref,
        uses=[(USE_WORDS[use], verdict.level(use).value) for use in Use],
        facts=_facts(version, verdict),
        overrides=override_lines(overrides_of(version)),
        fired=[check_row(check) for check in checks if check.level in FIRED],
        passed=[check_row(check) for check in checks if check.level is Level.PASS],
        reported=[check_row(check) for check in checks if check.level is Level.REPORT],
        docs_link=docs_link,
        row_checks=row_checks,
        shares=[_shares(name, shares) for name, shares in data.shares.items()],
        entropies=[_entropy(name, lines, verdict) for name, lines in data.entropies.items()],
        coverage=[picture for name in data.coverage for picture in _coverage(name, data)],
        returns=[_returns(name, data) for name in data.returns],
        sample_sizes=[_sample_size(name, data) for name in data.sample_sizes],
        calibration=[_calibration(name, data) for name in data.calibration],
    )


def _facts(version: Version, verdict: Verdict) -> list[tuple[str, str]]:
    counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in sorted(version.manifest.counts.items()))
    return [
        ("holds", counts),
        ("sealed", version.manifest.created_at),
        ("checked", f"{verdict.checked_at}, {len({check.name for check in verdict.checks})} checks"),
        ("digest", verdict.digest),
    ]


def _shares(environment: str, shares: dict[str, dict[str, float]]) -> Picture:
    waits = "; ".join(f"{name} waits {100 * ops['WAIT']:.0f} %" for name, ops in shares.items())
    return Picture(
        uri=shares_figure(shares), alt=f"Share of each op by behaviour on {environment}: {waits}.", title=environment
    )


def _entropy(environment: str, lines: dict[str, list[tuple[int, float]]], verdict: Verdict) -> Picture:
    whole = [check for check in verdict.checks if check.name == "action_entropy" and check.warn_threshold is not None]
    warn, block = (whole[0].warn_threshold, whole[0].block_threshold) if whole else (None, None)
    pooled = lines[""]
    least = min(pooled, key=lambda point: point[1])
    return Picture(
        uri=figures.entropy_figure(lines, warn, block),
        alt=(
            f"Entropy of the op by step on {environment}: all behaviours together from {pooled[0][1]:.2f} to "
            f"{pooled[-1][1]:.2f} nats, least {least[1]:.2f} at step {least[0]}."
        ),
        title=environment,
        note=f"All behaviours together: least {least[1]:.2f} nats, at step {least[0]}.",
    )


def _coverage(environment: str, data: HealthPageData) -> list[Picture]:
    found = data.coverage[environment]
    empty_ops = int(((found.taken_SO == 0) & (found.valid_SO > 0)).sum())
    empty_pairs = int(((found.germinated_BL == 0) & found.possible_BL).sum())
    pairs = int(found.possible_BL.sum())
    return [
        Picture(
            uri=figures.slots_figure(found),
            alt=f"Decisions by slot and op on {environment}; {empty_ops} pairs were valid and never taken.",
            title=f"{environment}: slot × op",
            note=f"{empty_ops} of {int((found.valid_SO > 0).sum())} pairs were never taken.",
        ),
        Picture(
            uri=figures.levers_figure(found),
            alt=f"Germinations by blueprint and lever on {environment}; {empty_pairs} of {pairs} pairs are empty.",
            title=f"{environment}: blueprint × lever",
            note=f"{empty_pairs} of {pairs} pairs were never germinated.",
        ),
    ]


def _returns(environment: str, data: HealthPageData) -> Picture:
    returns = data.returns[environment]
    unit = "paired accuracy, points" if environment in data.in_points else "return"
    values = [value for behaviour in returns.values() for value in behaviour]
    above = sum(value > 0 for value in values)
    return Picture(
        uri=figures.returns_figure(returns, unit),
        alt=(
            f"Distribution of the {unit} by behaviour on {environment}: {above} of {len(values)} episodes above "
            f"never-act, best {short_number(max(values))}."
        ),
        title=environment,
        note=f"{above} of {len(values)} episodes end above never-act; the best reaches {short_number(max(values))}.",
    )


def _sample_size(environment: str, data: HealthPageData) -> Picture:
    lines = data.sample_sizes[environment]
    middle = figures.median_line({name: line for name, (line, _) in lines.items()})
    told = f"of {max(number for _, number in lines.values())} episodes a behaviour, half are worth less than"
    return Picture(
        uri=figures.sample_size_figure(lines),
        alt=(
            f"Effective sample size by horizon on {environment}: {told} {middle[-1][1]:.1f} episodes "
            f"at step {middle[-1][0]}."
        ),
        title=environment,
        note=f"At step {middle[-1][0]}, {told} {middle[-1][1]:.1f}.",
    )


def _calibration(environment: str, data: HealthPageData) -> Picture:
    found = data.calibration[environment]
    missed, bins = figures.outside(found), len(found.stated)
    return Picture(
        uri=figures.calibration_figure(found),
        alt=f"Calibration of op probabilities on {environment}: {missed} of {bins} bins off the diagonal.",
        title=environment,
        note=(
            f"{missed} of {bins} bins lie off the diagonal by more than their 95 % interval; "
            f"by chance about {0.05 * bins:.1f} would."
        ),
    )
