from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import synthetic_tables

from esper.karn.store import open_store
from esper.leyline.errors import SpecError, StoreError, UnknownNameError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.stages import Stage
from esper.leyline.verdict import CheckResult, Level, Use, Verdict
from quality import summary
from quality.behaviour import audit_score
from quality.checking import DOCS_INDEX, check
from quality.measures import Measure
from quality.rows import one_step_relation
from quality.suites import judge
from quality.thresholds import THRESHOLDS_FILE, load_thresholds
from quality.tree_audit import RatioSums


def test_the_verdict_of_a_sealed_version_is_bound_to_its_digest_and_can_be_stored(tmp_path: Path) -> None:
    dataset = open_store(tmp_path / "store").dataset("tiny")
    dataset.commit(synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random", "never-act"), horizon=8))
    version = dataset.seal(matrix_id="m", provenance={})
    reward = load("rewards", "digits-gap", RewardSpec)
    verdict = check(version, docs_dir=tmp_path / "docs", rewards={"digits-gap": reward})
    version.write_verdict(verdict)
    assert version.verdict() == verdict
    assert verdict.digest == version.manifest.digest
    assert (tmp_path / "docs" / DOCS_INDEX).is_file()
    assert {result.name for result in verdict.checks} == set(load_thresholds())
    assert verdict.level(Use.IMITATION) is Level.BLOCK  # three behaviours are too few
    assert summary.rows(verdict)[0].level == "block"


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
