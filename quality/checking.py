"""Is a sealed version fit for its uses: measure, judge, and say so in a verdict."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from esper.karn.catalogue import connect
from esper.karn.store import Dataset, Version
from esper.leyline.errors import IntegrityError
from esper.leyline.rewards import RewardSpec
from esper.leyline.schema import OLDEST_SCHEMA, SCHEMA_VERSION, schema_version_of
from esper.leyline.verdict import CheckResult, Verdict
from quality import (
    behaviour,
    bins,
    clusters,
    coverage,
    drift,
    dynamics,
    effect,
    leakage,
    rewards,
    structure,
    value,
    values,
)
from quality.measures import Measure, environments
from quality.profile import take_profile
from quality.thresholds import load_thresholds
from quality.tree_audit import run_audit
from quality.working import prepare

DOCS_INDEX = "index.html"
"""The first page of the Data Docs, under the folder that `check` was given."""

Rewards = Mapping[str, RewardSpec]


def measure_all(
    connection: duckdb.DuckDBPyConnection,
    reward_specs: Rewards | None = None,
    *,
    previous: duckdb.DuckDBPyConnection | None = None,
    schema_problems: Sequence[str] = (),
) -> list[Measure]:
    """Return every measure of the data behind a connection that has the views `steps` and `episodes`.

    Working tables (`health_*`) are left on the connection: with them a failing check's rows can be looked up. Where a
    column is missing or of another type, that is the only measure: every other check reads columns.

    Args:
        connection: The data.
        reward_specs: The reward of each environment, for the returns; the components are checked without.
        previous: The previous sealed version, for drift.
        schema_problems: What the caller found in the files' own schemas.
    """
    problems = [*schema_problems, *structure.stale(connection)]
    if problems:
        return structure.measure_schema(problems)
    prepare(connection)
    names = environments(connection)
    profile = take_profile(connection)
    audit = run_audit(connection)
    specs = reward_specs or {}
    recomputed = rewards.audit_rewards(connection, specs)
    return [
        *structure.measure_schema(()),
        *structure.measure(connection, names, profile),
        *dynamics.measure(connection, names),
        *audit.actions.measures("valid_actions", names, "every action is canonical and in its mask"),
        *audit.masks.measures("masks_recompute", names, "every mask follows from its row"),
        *effect.measure(connection, names),
        *rewards.measure(recomputed, names),
        *value.measure(connection, names, specs, recomputed.returns),
        *coverage.measure(connection, names),
        *values.measure(connection, names),
        *clusters.measure(connection, names),
        *bins.measure(connection, names),
        *behaviour.measure(connection, names, audit),
        *leakage.measure(connection, names, profile),
        *drift.measure(connection, names, previous),
    ]


def examine(
    connection: duckdb.DuckDBPyConnection,
    *,
    docs_dir: Path | None,
    rewards: Rewards | None = None,
    previous: duckdb.DuckDBPyConnection | None = None,
    schema_problems: Sequence[str] = (),
) -> tuple[CheckResult, ...]:
    """Return the results of all checks of the data behind a connection; Data Docs go to `docs_dir`, if any."""
    from quality.suites import judge  # Great Expectations takes seconds to import

    measures = measure_all(connection, rewards, previous=previous, schema_problems=schema_problems)
    return judge(measures, load_thresholds(), docs_dir)


def stored_schema_problems(version: Version) -> list[str]:
    """Return how the files of a sealed version differ from leyline's schema: its number, and columns they lack.

    A file that an older schema wrote lacks what came later, and nothing else.
    """
    problems = []
    if not OLDEST_SCHEMA <= version.manifest.schema_version <= SCHEMA_VERSION:
        expected = f"expected {OLDEST_SCHEMA} to {SCHEMA_VERSION}"
        problems.append(f"schema version {version.manifest.schema_version}, {expected}")
    for table in ("steps", "episodes"):
        lacking: dict[str, int] = {}
        for path in version.files(table):
            found = pq.read_schema(path)
            for problem in structure.schema_problems(table, found, schema_version_of(table, found.names)):
                if problem.endswith("is missing") and problem != f"{table}.environment is missing":  # the partition
                    lacking[problem] = lacking.get(problem, 0) + 1
        problems += [f"{problem} in {number} files" for problem, number in lacking.items()]
    return problems


def connect_previous(version: Version) -> duckdb.DuckDBPyConnection | None:
    """Return a connection to the sealed version before, None where there is none or its files are gone."""
    dataset = Dataset(version.place, version.name)
    older = [number for number in dataset.version_numbers() if number < version.number]
    if not older:
        return None
    try:
        return connect(Version.open(version.place, older[-1]))
    except IntegrityError:  # its own check says so; this version is none the worse
        return None


def check(version: Version, *, docs_dir: Path, rewards: Rewards | None = None) -> Verdict:
    """Return the verdict on a sealed version, bound to its digest; the caller stores it.

    After the call the Data Docs lie under `docs_dir`, their first page is `docs_dir / DOCS_INDEX`.

    Args:
        version: The sealed version.
        docs_dir: Folder of the Data Docs, made where it is missing.
        rewards: The reward of each environment, for the returns; the components are checked without.

    Raises:
        StoreError: The version cannot be read, or `docs_dir` cannot be written.
    """
    problems = stored_schema_problems(version)
    connection = connect(version)
    previous = connect_previous(version)
    try:
        results = examine(connection, docs_dir=docs_dir, rewards=rewards, previous=previous, schema_problems=problems)
    finally:
        connection.close()
        if previous is not None:
            previous.close()
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        checks=results,
    )
