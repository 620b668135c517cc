"""Is a sealed version fit for its uses: measure, judge, and say so in a verdict."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path

import duckdb

from esper.karn.catalogue import connect
from esper.karn.store import Version
from esper.leyline.rewards import RewardSpec
from esper.leyline.verdict import CheckResult, Verdict
from quality import behaviour, coverage, dynamics, leakage, structure, value
from quality.measures import Measure, environments
from quality.rows import prepare
from quality.thresholds import load_thresholds
from quality.tree_audit import run_audit

DOCS_INDEX = "index.html"
"""The first page of the Data Docs, under the folder that `check` was given."""


def measure_all(
    connection: duckdb.DuckDBPyConnection, rewards: Mapping[str, RewardSpec] | None = None
) -> list[Measure]:
    """Return every measure of the data behind a connection that has the views `steps` and `episodes`.

    Working tables (`health_*`) are left on the connection: with them a failing check's rows can be looked up.
    """
    prepare(connection)
    names = environments(connection)
    audit = run_audit(connection)
    return [
        *structure.measure(connection, names),
        *dynamics.measure(connection, names),
        *audit.actions.measures("valid_actions", names, "every action is canonical and in its mask"),
        *audit.masks.measures("masks_recompute", names, "every mask follows from its row"),
        *value.measure(connection, names, rewards or {}),
        *coverage.measure(connection, names),
        *behaviour.measure(connection, names, audit),
        *leakage.measure(connection, names),
    ]


def examine(
    connection: duckdb.DuckDBPyConnection, *, docs_dir: Path | None, rewards: Mapping[str, RewardSpec] | None = None
) -> tuple[CheckResult, ...]:
    """Return the results of all checks of the data behind a connection; Data Docs go to `docs_dir`, if any."""
    from quality.suites import judge  # Great Expectations takes seconds to import

    return judge(measure_all(connection, rewards), load_thresholds(), docs_dir)


def check(version: Version, *, docs_dir: Path, rewards: Mapping[str, RewardSpec] | None = None) -> Verdict:
    """Return the verdict on a sealed version, bound to its digest; the caller stores it.

    After the call the Data Docs lie under `docs_dir`, their first page is `docs_dir / DOCS_INDEX`.

    Args:
        version: The sealed version.
        docs_dir: Folder of the Data Docs, made where it is missing.
        rewards: The reward of each environment, for the spread of returns; the components are checked without.

    Raises:
        StoreError: The version cannot be read, or `docs_dir` cannot be written.
    """
    connection = connect(version)
    try:
        results = examine(connection, docs_dir=docs_dir, rewards=rewards)
    finally:
        connection.close()
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        checks=results,
    )
