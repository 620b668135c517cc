from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from factories import synthetic_tables

from esper.karn.catalogue import connect
from esper.karn.store import Version, open_store
from esper.leyline.errors import SpecError, StoreError, UnknownNameError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.stages import Stage
from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from quality import summary
from quality.audit import RatioSums
from quality.behaviour import audit_score
from quality.bins import rarefied
from quality.checking import DOCS_INDEX, check, connect_previous, stored_schema_problems
from quality.drift import stability_index
from quality.measures import Measure
from quality.rows import ROW_CHECKS, failing_rows
from quality.suites import judge
from quality.support import Calibration
from quality.thresholds import THRESHOLDS_FILE, load_thresholds
from quality.value import interval
from quality.working import one_step_relation


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Version:
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("tiny")
    dataset.commit(synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random", "never-act"), horizon=8))
    return dataset.seal(matrix_id="m", provenance={})


def test_the_verdict_of_a_sealed_version_is_bound_to_its_digest_and_can_be_stored(
    sealed: Version, tmp_path: Path
) -> None:
    version = sealed
    reward = load("rewards", "digits-gap", RewardSpec)
    verdict = check(version, docs_dir=tmp_path / "docs", rewards={"digits-gap": reward})
    version.write_verdict(verdict)
    assert version.verdict() == verdict
    assert verdict.digest == version.manifest.digest
    assert (tmp_path / "docs" / DOCS_INDEX).is_file()
    assert {result.name for result in verdict.checks} == set(load_thresholds())
    assert verdict.level(Use.IMITATION) is Level.BLOCK  # three behaviours are too few
    assert summary.rows(verdict)[0].level == "block"


def test_a_version_of_an_older_schema_is_blocked_by_that_alone(sealed: Version, tmp_path: Path) -> None:
    stale = Version(sealed.root, sealed.manifest.model_copy(update={"schema_version": 0}))
    verdict = check(stale, docs_dir=tmp_path / "docs")
    assert [(result.name, result.level) for result in verdict.checks] == [("schema", Level.BLOCK)]
    assert "schema version 0" in verdict.checks[0].message


def test_a_file_that_lacks_a_column_is_found_by_its_own_schema(sealed: Version, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(sealed.root, root)
    entry = next(entry for entry in sealed.manifest.files if entry.table == "steps")
    path = root / entry.path
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["s1_weight_norm"]), path)
    smaller = entry.model_copy(update={"size": path.stat().st_size})
    files = tuple(smaller if item == entry else item for item in sealed.manifest.files)
    older = Version(root, sealed.manifest.model_copy(update={"files": files}))
    assert stored_schema_problems(sealed) == []
    assert stored_schema_problems(older) == ["steps.s1_weight_norm is missing in 1 files"]


def test_the_rows_of_a_sealed_version_can_be_listed_on_its_locked_connection(sealed: Version) -> None:
    with connect(sealed) as connection:
        for name in ROW_CHECKS:
            found = failing_rows(connection, name, 3)
            assert found.num_rows == 0, name
            assert found.column_names[:4] == ["environment", "episode_id", "step", "found"]


def test_a_later_version_is_compared_with_the_one_before(tmp_path: Path) -> None:
    dataset = open_store(tmp_path / "store").dataset("grown")
    dataset.commit(synthetic_tables(num_env_seeds=1, behaviours=("baseline", "random")))
    first = dataset.seal(matrix_id="m", provenance={})
    dataset.commit(synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random"), first_replicate=1))
    second = dataset.seal(matrix_id="m", provenance={})
    assert connect_previous(first) is None
    verdict = check(second, docs_dir=tmp_path / "docs")
    drifted = {result.name: result for result in verdict.checks if result.name in ("feature_drift", "action_drift")}
    assert len(drifted) == 2
    assert all(result.value is not None for result in drifted.values())


def test_every_threshold_has_a_reason_a_remedy_and_a_comment_on_its_meaning() -> None:
    for name, threshold in load_thresholds().items():
        assert len(threshold.reason) > 30, name
        assert threshold.remedy, name
        if threshold.warn is not None and threshold.block is not None:
            assert (threshold.warn < threshold.block) == (threshold.bad == "high"), name


def test_an_unknown_key_of_the_thresholds_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(THRESHOLDS_FILE.read_text().replace("\nblock = 0.02", "\nblok = 0.02"))
    with pytest.raises(SpecError, match="did you mean 'block'"):
        load_thresholds(path)


def test_a_measure_without_a_threshold_is_refused(tmp_path: Path) -> None:
    stray = Measure(check="action_coverge", environment="all", value=1.0, message="")
    with pytest.raises(UnknownNameError, match="action_coverage"):
        judge([stray], load_thresholds(), tmp_path)


def test_docs_that_cannot_be_written_are_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="health report"):
        judge([], load_thresholds(), tmp_path / "file" / "docs")


@pytest.mark.parametrize(
    ("value", "level"), [(0.06, Level.PASS), (0.03, Level.WARN), (0.01, Level.BLOCK), (None, Level.REPORT)]
)
def test_a_value_falls_on_the_level_of_its_thresholds(value: float | None, level: Level, tmp_path: Path) -> None:
    found = judge(
        [
            Measure(check="action_coverage", environment="all", value=value, message=""),
            Measure(check="action_coverage", environment="digits-gap", value=0.0, message=""),
        ],
        load_thresholds(),
        tmp_path,
    )
    assert [result.level for result in found] == [level, Level.REPORT]


def test_one_step_starts_training_and_may_pass_the_first_cool_down_epoch_but_skips_nothing_else() -> None:
    relation = one_step_relation()
    assert (Stage.DORMANT, Stage.TRAINING) in relation
    assert (Stage.HOLDING, Stage.EMBARGOED) in relation
    for wrong in (
        (Stage.DORMANT, Stage.BLENDING),
        (Stage.TRAINING, Stage.HOLDING),
        (Stage.FOSSILIZED, Stage.PRUNED),
        (Stage.EMBARGOED, Stage.DORMANT),
    ):
        assert wrong not in relation


def test_the_audit_score_is_in_standard_errors_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=(50, 40))
    clusters = [RatioSums(float(row.sum()), float((row**2).sum()), row.size) for row in values]
    expected = abs(values.mean()) / (values.std() / np.sqrt(values.size))
    assert audit_score(clusters) == pytest.approx(expected, rel=0.25)


def test_the_audit_score_counts_agreeing_rows_of_one_cluster_once() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=(30, 1)) + 0.1, 100, axis=1)
    clusters = [RatioSums(float(row.sum()), float((row**2).sum()), row.size) for row in values]
    means = values[:, 0]
    assert audit_score(clusters) == pytest.approx(abs(means.mean()) / (means.std(ddof=1) / np.sqrt(30)), rel=1e-6)


def test_one_cluster_gives_no_audit_score() -> None:
    assert audit_score([RatioSums(1.0, 4.0, 10)]) is None


def test_the_summary_puts_blocks_first_and_leaves_out_reports_when_asked() -> None:
    def result(name: str, level: Level) -> CheckResult:
        return CheckResult(name=name, environment="all", level=level, value=0.5, block_threshold=1.0, message="m")

    checks = tuple(result(level.value, level) for level in (Level.REPORT, Level.PASS, Level.BLOCK, Level.WARN))
    verdict = Verdict(dataset="d", version=1, digest="x", checked_at="2026-01-01T00:00:00+00:00", checks=checks)
    assert [row.level for row in summary.rows(verdict)] == ["block", "warn", "pass", "report"]
    assert [row.level for row in summary.rows(verdict, reports=False)] == ["block", "warn", "pass"]
    assert summary.uses(verdict) == dict.fromkeys(Use, Level.BLOCK)


def test_rarefaction_counts_the_kinds_that_a_smaller_sample_would_hold() -> None:
    counts = np.array([5, 3, 1, 1])
    generator = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), counts)
    drawn = [len(set(generator.choice(kinds, 4, replace=False).tolist())) for _ in range(4000)]
    assert rarefied(counts, 4) == pytest.approx(np.mean(drawn), abs=0.05)
    assert rarefied(counts, 10) == 4
    assert rarefied(counts, 1) == pytest.approx(1)


def test_calibration_forgives_noise_and_finds_another_policy() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.uniform(0.05, 0.95, 20_000)
    right, wrong = Calibration(), Calibration()
    right.add(predicted, generator.random(len(predicted)) < predicted)
    wrong.add(predicted, generator.random(len(predicted)) < predicted**3)
    assert right.error()[0] > 0
    assert right.error()[1] == 0
    assert wrong.error()[1] == pytest.approx(np.mean(predicted - predicted**3), abs=0.03)


def test_the_stability_index_is_zero_for_equal_shares_and_the_sum_of_its_terms_otherwise() -> None:
    even, odd = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert stability_index(even, even) == 0
    assert stability_index(odd, even) == pytest.approx(-0.25 * np.log(0.5) + 0.25 * np.log(1.5))


def test_intervals_go_by_env_seed_not_by_episode() -> None:
    values = np.array([1.0, 1.0, 1.0, 4.0])
    mean, half, clusters = interval(values, np.array([7, 7, 7, 8]))
    assert (mean, clusters) == (2.5, 2)
    assert half == pytest.approx(12.706 * np.std([1, 4], ddof=1) / np.sqrt(2), rel=1e-3)
    assert np.isnan(interval(values, np.zeros(4, dtype=np.int64))[1])
