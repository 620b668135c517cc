"""The tables of algorithms and members, and the page of an evaluation."""

import pytest
from factories import synthetic_tables
from test_report import evaluation, interval

from esper.karn.comparison_page import comparison_page, markdown_table
from esper.karn.comparison_table import (
    HEADINGS,
    POOLED_HEADINGS,
    algorithm_table,
    algorithm_title,
    drawn_arms_of,
    findings,
    full_table,
    headings,
    member_headings,
    member_table,
    row_names,
    title,
)
from esper.karn.report import build_report
from esper.karn.store import open_store
from esper.leyline.comparison import AlgorithmResult, BanditResult

FAMILY, MEMBERS = "digits-mix", ("digits-mix-a", "digits-mix-b")


def algorithm(environment, mean=1.5):
    over = {name: interval(mean - i) for i, name in enumerate(("never-act", "heuristic", "best-fixed", "bandit"))}
    return AlgorithmResult(
        environment=environment,
        algorithm="iql",
        policies=("iql", "ppo"),
        test_accuracy_percent=interval(45),
        mean_return=interval(mean).model_copy(update={"num_controller_seeds": 2, "method": "crossed bootstrap"}),
        iqm_return=interval(mean + 0.1),
        gain_over=over,
        return_over=over,
        iqm_return_over=over,
        growth_factor=2.0,
        train_gflops=3.0,
        num_diverged=1,
        num_rolled_back=0,
        predicted_return=1.25,
    )


@pytest.fixture
def mixed():
    base = evaluation((FAMILY, *MEMBERS))
    pooled = [arm for arm in base.arms if arm.environment == FAMILY]
    bandit = BanditResult(
        environment=FAMILY,
        schedule="s",
        description="conv_heavy in slot 1 at epoch 0",
        num_arms=48,
        num_pulls=88,
        num_lost=0,
        times_pulled=20,
        posterior_mean=1.7,
        posterior_sd=0.1,
        noise_sd=0.4,
    )
    changes = {
        "arms": tuple(
            arm.model_copy(update={"return_over": {**arm.return_over, "bandit": interval(0.5)}}) for arm in pooled
        ),
        "members": tuple(arm for arm in base.arms if arm.environment != FAMILY),
        "algorithms": tuple(algorithm(name) for name in (FAMILY, *MEMBERS)),
        "bandits": (bandit,),
        "families": {FAMILY: MEMBERS},
        "best_fixed": base.best_fixed[:1],
        "controls": base.controls[:1],
    }
    return base.model_copy(update=changes)


def test_a_bandit_brings_a_column(mixed):
    plain = evaluation((FAMILY,))
    assert headings(plain, FAMILY) == HEADINGS
    assert headings(mixed, FAMILY)[8] == "return over bandit"
    rows = full_table(mixed, FAMILY)
    assert {len(row) for row in rows} == {len(HEADINGS) + 1}
    assert {row[8] for row in rows} == {"+0.50\n+0.20 … +0.80"}


def test_an_algorithm_is_one_row_with_its_seeds_its_mishaps_and_its_prediction(mixed):
    (row,) = algorithm_table(mixed, FAMILY)
    assert len(row) == len(POOLED_HEADINGS)
    named = dict(zip(POOLED_HEADINGS, row))
    assert named["arm"] == "iql ×2\n1 diverged"
    assert (named["predicted return"], named["size, GFLOP"]) == ("+1.25", "×2.00\n3")
    assert named["return over best-fixed"].startswith("−0.50")
    assert "2 controller seeds on 20" in algorithm_title(mixed, FAMILY)


def test_members_are_columns_and_policies_of_an_algorithm_one_row(mixed):
    assert member_headings(mixed, FAMILY) == ("arm", "a", "b")
    names = row_names(mixed, FAMILY)
    assert names[-2:] == ["bc", "iql"]
    table = {row[0]: row[1:] for row in member_table(mixed, FAMILY)}
    assert list(table) == names
    assert table["iql"] == ["+1.50\n(−0.50)"] * 2
    assert table["best-fixed"] == ["+2.40"] * 2


def test_findings_speak_of_the_algorithm_and_the_bandit(mixed):
    told = findings(mixed, FAMILY)
    assert len(told) == 2
    assert told[0].startswith("iql (2 seeds): its return is higher than never-act (+1.50) and heuristic (+0.50)")
    assert "bandit (−1.50)" in told[0]


def test_the_title_names_members_and_the_bandit(mixed):
    assert "20 held-out environment seeds x 2 members" in title(mixed, FAMILY)
    assert "bandit: conv_heavy in slot 1 at epoch 0, 88 pulls of 48 arms" in title(mixed, FAMILY)


def test_the_page_holds_every_table(mixed):
    page = comparison_page(mixed)
    assert page.count("\n| ---") == 4
    assert "| ppo |" not in page  # a policy of an algorithm with several seeds
    assert "| iql ×2<br>1 diverged |" in page
    assert "- iql (2 seeds)" in page
    assert "passed" in page


def test_figures_show_an_algorithm_as_one_arm(mixed):
    drawn = {arm.arm: arm for arm in drawn_arms_of(mixed, FAMILY)}
    assert list(drawn)[-2:] == ["bc", "iql ×2"]
    parts = [arm.seed_params for arm in mixed.arms if arm.environment == FAMILY and arm.arm in {"iql", "ppo"}]
    assert drawn["iql ×2"].seed_params == sum(parts) / 2
    assert drawn["iql ×2"].return_over["best-fixed"] == mixed.algorithms[0].return_over["best-fixed"]


def test_the_report_has_the_algorithms_and_the_members_and_no_single_policy_of_an_algorithm(mixed, tmp_path):
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=1))
    version = dataset.seal(matrix_id="m", provenance={})
    html = build_report(version, evaluation=mixed, events=tmp_path, out=tmp_path / "r.html").read_text()
    assert html.count("<th>iql ×2") == 1
    assert "<th>ppo" not in html
    assert html.count("<th>iql</th>") == 1  # a row of the table of members
    assert "2 controller seeds on 20" in html
    assert "mean return by member" in html


def test_cells_of_markdown_keep_their_lines_and_bars():
    assert markdown_table(("a", "b"), [("x\ny", "|")]) == "| a | b |\n| --- | ---: |\n| x<br>y | \\| |"


def test_the_terminal_shows_an_algorithm_once_and_the_members(mixed, capsys):
    from esper.cli.comparison import print_comparison

    print_comparison(mixed)
    said = capsys.readouterr().out
    assert "iql ×2" in said
    assert "mean return by member, and in brackets the difference to the best fixed schedule" in said
    assert "│ ppo" not in said
    assert "│ bc" in said
