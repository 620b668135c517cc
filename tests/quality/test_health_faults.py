from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pytest
from factories import Tables, synthetic_tables
from health_cases import CASES, RULES, Case, blocked, connected, levels_of, measured

from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.verdict import Level
from quality.measures import Measure
from quality.rows import ROW_CHECKS, failing_rows

PAGE = Path(__file__).parents[2] / "docs" / "health.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@pytest.fixture(scope="module")
def good() -> Tables:
    return synthetic_tables(num_env_seeds=4, horizon=12, behaviours=RULES, refusal_rate=0.1)


FIRST = tuple({case.check: case for case in reversed(CASES)}.values())
"""One fault of every check: measuring one takes a second."""
OTHERS = tuple(case for case in CASES if case not in FIRST)


def measured_all(good: Tables, cases: Sequence[Case]) -> dict[str, list[Measure]]:
    return {"good": measured(good)} | {case.name: measured(case.plant(dict(good))) for case in cases}


@pytest.fixture(scope="module")
def measures(good: Tables) -> dict[str, list[Measure]]:
    return measured_all(good, FIRST)


@pytest.fixture(scope="module")
def levels(measures: dict[str, list[Measure]]) -> dict[str, dict[str, Level]]:
    return levels_of(measures)


@pytest.mark.parametrize("case", FIRST, ids=[case.plant.__name__ for case in FIRST])
def test_a_planted_fault_fires_its_check_and_blocks_no_unrelated_one(
    case: Case, levels: dict[str, dict[str, Level]], measures: dict[str, list[Measure]]
) -> None:
    check_fires(case, levels, measures)


def check_fires(case: Case, levels: dict[str, dict[str, Level]], measures: dict[str, list[Measure]]) -> None:
    found = levels[case.name]
    assert found[case.check] is case.level
    expected = {case.check} if case.level is Level.BLOCK else set()
    assert blocked(found) <= expected | set(case.related)
    assert next(measure.message for measure in measures[case.name] if measure.check == case.check)


def test_the_library_is_large_and_what_it_starts_from_is_good(levels: dict[str, dict[str, Level]]) -> None:
    assert len(CASES) >= 25
    assert len({case.name for case in CASES}) == len(CASES)
    assert blocked(levels["good"]) == set()


HEAD = ["| planted fault | caught by | level | fires besides |", "|---|---|---|---|"]


def _lines(levels: Mapping[str, Mapping[str, Level]], cases: Sequence[Case]) -> list[str]:
    good = {name for name, level in levels["good"].items() if level is Level.WARN}
    lines = []
    for case in cases:
        found = levels[case.name]
        others = [
            f"{name} ({level.value})"
            for name, level in found.items()
            if name != case.check and (level is Level.BLOCK or (level is Level.WARN and name not in good))
        ]
        lines.append(f"| {case.name} | `{case.check}` | {found[case.check].value} | {', '.join(others) or '-'} |")
    return lines


def _on_the_page() -> list[str]:
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()


def test_the_page_has_a_line_for_every_fault_and_those_measured_here_are_right(
    levels: dict[str, dict[str, Level]],
) -> None:
    found = _on_the_page()
    assert found[:2] == HEAD
    assert [line.split("|")[1:3] for line in found[2:]] == [[f" {case.name} ", f" `{case.check}` "] for case in CASES]
    assert set(_lines(levels, FIRST)) <= set(found)


@pytest.mark.slow
def test_every_planted_fault_fires_and_the_page_shows_the_table(good: Tables) -> None:
    measures = measured_all(good, CASES)
    levels = levels_of(measures)
    for case in OTHERS:
        check_fires(case, levels, measures)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    expected = "\n".join([*HEAD, *_lines(levels, CASES)])
    if os.environ.get("ESPER_WRITE_DOCS") == "1":
        PAGE.write_text(f"{before}{BEGIN}\n{expected}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    assert _on_the_page() == expected.splitlines(), (
        f"run ESPER_WRITE_DOCS=1 pytest -m slow {Path(__file__).name} and commit the page"
    )


BY_NAME = {case.plant.__name__: case for case in CASES}


@pytest.mark.parametrize(
    ("fault", "explained"),
    [
        ("action_not_executed", "op"),
        ("nan_feature", "actor"),
        ("end_marked_early", "terminated"),
        ("alpha_above_one", "s0_alpha"),
        ("second_spelling_of_wait", "action_blueprint"),
        ("mask_of_another_state", "valid_ops"),
        ("op_marginals_do_not_sum", "op_probs"),
        ("rewards_shifted", "reward_accuracy_points"),
        ("missing_step", "num_steps"),
        ("leaked_env_seed", "env_seed"),
        ("seed_not_in_forward_pass", "controller"),
    ],
)
def test_the_failing_rows_name_the_step_and_the_columns_that_explain_it(
    fault: str, explained: str, good: Tables
) -> None:
    case = BY_NAME[fault]
    planted = case.plant(dict(good))
    with connected(planted) as connection:
        found = failing_rows(connection, case.check, 5)
    assert 0 < found.num_rows <= 5
    assert found.column_names[:4] == ["environment", "episode_id", "step", "found"]
    assert explained in found.column_names
    row = found.to_pylist()[0]
    assert row["found"]
    assert row["episode_id"] in planted["episodes"]["episode_id"].to_pylist()


def test_every_blocking_check_that_counts_rows_lists_them() -> None:
    counted = {case.check for case in CASES if case.level is Level.BLOCK}
    whole = {
        *("schema", "action_coverage", "single_action_clusters", "policy_diversity"),
        *("propensity_audit", "propensity_calibration"),
    }
    assert counted - whole <= set(ROW_CHECKS)


def test_a_check_without_rows_names_those_that_have_some() -> None:
    with duckdb.connect() as connection:
        with pytest.raises(SpecError, match=r"no rows\n.*valid_actions"):
            failing_rows(connection, "action_entropy", 5)
        with pytest.raises(UnknownNameError, match="did you mean 'valid_actions'"):
            failing_rows(connection, "valid_action", 5)
