"""Great Expectations: small frames of measures, one suite each, and the Data Docs that show them.

Quantities are aggregated in DuckDB and NumPy before; what Great Expectations decides is whether each lies within its
thresholds. An expectation with severity `critical` blocks, one with `warning` warns. Usage analytics are off.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the library is imported: no telemetry, no network

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.row_conditions import Column

from esper.leyline.errors import HealthError, StoreError
from esper.leyline.verdict import CheckResult, Level, Use
from quality.measures import WHOLE, Measure
from quality.thresholds import Threshold, threshold_of

SITE = "health"
_SEVERITY = {Level.BLOCK: "critical", Level.WARN: "warning"}
_RESULT_FORMAT = {"result_format": "COMPLETE", "unexpected_index_column_names": ["environment"]}

Failed = dict[tuple[str, Level], set[str]]
"""Environments (or the whole) that failed a check's threshold."""


def _open_context(docs_dir: Path | None) -> Any:
    """Return an in-memory context whose one Data Docs site is written to a folder, or that has none."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for name, site in dict(context.variables.data_docs_sites or {}).items():
        folder = Path(site["store_backend"]["base_directory"])
        if folder.parent == Path(tempfile.gettempdir()):  # made by the call above, for the site that goes
            shutil.rmtree(folder, ignore_errors=True)
        context.delete_data_docs_site(name)
    if docs_dir is not None:
        _add_site(context, docs_dir)
    return context


def _add_site(context: Any, docs_dir: Path) -> None:
    try:
        docs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write the health report to {docs_dir}: {error.strerror}") from None
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_dir.resolve())}
    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": backend,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context.add_data_docs_site(site_name=SITE, site_config=site)


def frame_of(measures: Sequence[Measure]) -> pd.DataFrame:
    """Return one row per environment and one column per check; null where there is nothing to measure."""
    checks = list(dict.fromkeys(measure.check for measure in measures))
    places = sorted({measure.environment for measure in measures}, key=lambda name: (name != WHOLE, name))
    values = {(measure.check, measure.environment): measure.value for measure in measures}
    columns = {check: [values.get((check, place)) for place in places] for check in checks}
    return pd.DataFrame({"environment": places, **{name: pd.Series(v, dtype="float64") for name, v in columns.items()}})


def _expectation(check: str, threshold: Threshold, level: Level, limit: float) -> Any:
    bound = {"max_value": limit} if threshold.bad == "high" else {"min_value": limit}
    where = {"row_condition": Column("environment") == WHOLE} if threshold.scope == "dataset" else {}
    return gxe.ExpectColumnValuesToBeBetween(
        column=check,
        severity=_SEVERITY[level],
        notes=f"{level.value.upper()} ({threshold.unit}). {threshold.reason} Remedy: {threshold.remedy}",
        meta={"check": check, "level": level.value},
        **bound,
        **where,
    )


def _validate(context: Any, suite: str, frame: pd.DataFrame, thresholds: Mapping[str, Threshold]) -> Failed:
    """Run one suite; return which environments failed which threshold."""
    source = context.data_sources.add_pandas(f"{suite}-measures")
    batch = source.add_dataframe_asset(suite).add_batch_definition_whole_dataframe("whole")
    expectations = [
        _expectation(check, thresholds[check], level, limit)
        for check in frame.columns.drop("environment")
        for level, limit in ((Level.BLOCK, thresholds[check].block), (Level.WARN, thresholds[check].warn))
        if limit is not None
    ]
    built = context.suites.add(gx.ExpectationSuite(suite, expectations=expectations))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=suite, data=batch, suite=built))
    outcome = definition.run(batch_parameters={"dataframe": frame}, result_format=_RESULT_FORMAT)
    failed: Failed = {}
    for result in outcome.results:
        meta = result.expectation_config.meta
        if "element_count" not in result.result:
            raise HealthError(f"expectation for {meta['check']} could not be evaluated: {result.exception_info}")
        places = {entry["environment"] for entry in result.result.get("unexpected_index_list") or []}
        failed[meta["check"], Level(meta["level"])] = places
    return failed


def _write_docs(context: Any, docs_dir: Path) -> None:
    try:
        context.build_data_docs(site_names=[SITE])
    except OSError as error:
        raise StoreError(f"cannot write the health report to {docs_dir}: {error.strerror}") from None


def _level(measure: Measure, threshold: Threshold, failed: Failed) -> Level:
    counted = (measure.environment == WHOLE) == (threshold.scope == "dataset")
    if measure.value is None or not counted or (threshold.warn is None and threshold.block is None):
        return Level.REPORT
    for level in (Level.BLOCK, Level.WARN):
        if measure.environment in failed.get((measure.check, level), ()):
            return level
    return Level.PASS


def _results(measure: Measure, threshold: Threshold, failed: Failed) -> list[CheckResult]:
    level = _level(measure, threshold, failed)
    fired = level in (Level.WARN, Level.BLOCK)
    value = measure.value if measure.value is None or math.isfinite(measure.value) else None
    result = CheckResult(
        name=measure.check,
        environment=measure.environment,
        level=level,
        value=value,
        warn_threshold=None if level is Level.REPORT else threshold.warn,
        block_threshold=None if level is Level.REPORT else threshold.block,
        message=measure.message,
        remedy=threshold.remedy if fired else "",
        uses=threshold.uses,
    )
    others = tuple(use for use in Use if use not in threshold.uses)
    if level is Level.BLOCK and threshold.warns_others and others:
        return [result, result.model_copy(update={"level": Level.WARN, "uses": others})]
    return [result]


def judge(
    measures: Sequence[Measure], thresholds: Mapping[str, Threshold], docs_dir: Path | None
) -> tuple[CheckResult, ...]:
    """Return the results of all checks, in the order of the thresholds' file; Data Docs go to `docs_dir`, if any.

    Raises:
        StoreError: The folder cannot be written.
        HealthError: An expectation could not be evaluated.
        UnknownNameError: A measure has no threshold.
    """
    by_suite: dict[str, list[Measure]] = {}
    for measure in measures:
        by_suite.setdefault(threshold_of(measure.check, dict(thresholds)).suite, []).append(measure)
    context = _open_context(docs_dir)
    failed: Failed = {}
    for suite, part in by_suite.items():
        failed |= _validate(context, suite, frame_of(part), thresholds)
    if docs_dir is not None:
        _write_docs(context, docs_dir)
    order = list(thresholds)
    ranked = sorted(measures, key=lambda m: (order.index(m.check), m.environment != WHOLE, m.environment))
    return tuple(result for measure in ranked for result in _results(measure, thresholds[measure.check], failed))
