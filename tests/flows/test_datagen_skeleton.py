"""Made-up episodes: what of them is real, and who refuses them."""

from __future__ import annotations

import pytest
import stand_in
import tiny

from esper.cli.main import main
from esper.karn.catalogue import connect
from esper.karn.kinds import is_skeleton
from esper.leyline.errors import SpecError
from flows.context import Context
from flows.datagen import DatagenRequest, generate, run_datagen
from flows.orchestration import LocalOrchestrator
from flows.planning import plan_matrix
from flows.skeleton import skeleton_cohort
from quality.checking import measure_all

INTEGRITY = {
    *("structure", "required_values", "episode_ends", "finite_values", "feature_ranges", "legal_transitions"),
    *("executed_flags", "alpha_range", "paired_control", "valid_actions", "masks_recompute", "germinations_make_seeds"),
    *("reward_recompute", "return_telescopes", "propensity_consistent", "duplicates"),
}
"""Checks that count what is wrong."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The row of 31 and four explorers on one environment seed, made up; the folder of its library and store."""
    folder = tmp_path_factory.mktemp("skeleton")
    root = tiny.write_library(folder, horizon=14)
    (root / "matrices" / "tiny.toml").write_text(
        'name = "tiny"\n[[cells]]\nenvironment = "tiny"\nreward = "tiny"\nexplorers = 4\nreplicates = 1\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        request = DatagenRequest(matrix="tiny", store=str(folder / "store"), workers=0, skeleton=True)
        return folder, run_datagen(request, LocalOrchestrator(1)).version


@pytest.fixture
def library(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return made[0]


def test_every_planned_episode_is_there_under_its_real_id_and_says_that_it_is_made_up(made, library):
    _, plans = plan_matrix("tiny")
    rows = made[1].table("episodes", columns=["episode_id", "data_source", "outcome"]).to_pylist()
    assert sorted(row["episode_id"] for row in rows) == sorted(name for plan in plans for name in plan.planned_ids())
    assert {(row["data_source"], row["outcome"]) for row in rows} == {("skeleton", "completed")}
    assert (made[1].ref, is_skeleton(made[1])) == ("tiny-skeleton@1", True)


def test_behaviours_are_real_and_no_check_that_counts_faults_finds_one(made):
    with connect(made[1]) as connection:
        measures = measure_all(connection)
    found = {measure.check: measure.value for measure in measures if measure.check in INTEGRITY}
    assert set(found) == INTEGRITY
    assert {name: value for name, value in found.items() if value} == {}
    ops = made[1].table("steps", columns=["op"])["op"].unique().to_pylist()
    assert set(ops) == {"WAIT", "GERMINATE", "ADVANCE", "FOSSILIZE", "PRUNE", None}


def test_equal_plans_give_equal_rows_and_branches_leave_their_parents(library):
    root = library / "datasets" / "matrices"
    (root / "branch.toml").write_text(
        'name = "branch"\n[[branches]]\nenvironment = "tiny"\nreward = "tiny"\nreplicate = 0\nstep = 6\n'
        'action = { op = "GERMINATE", slot = 0, blueprint = "conv_heavy", tempo_epochs = 3, dwell_epochs = 1 }\n'
    )
    _, (plan,) = plan_matrix("branch")
    one, two = skeleton_cohort(plan), skeleton_cohort(plan)
    assert one["steps"].equals(two["steps"])
    (branch,) = (row for row in one["episodes"].to_pylist() if row["branch_step"] == 6)
    assert branch["num_fossils"] == 1  # `complete` saw the forced seed through


@pytest.mark.parametrize(
    "command",
    [
        ["train", "bc", "tiny-skeleton", "--override-health", "only to try it out"],
        ["ope", "tiny-skeleton", "--policy", "gone"],
        ["evaluate", "tiny-skeleton"],
    ],
)
def test_what_learns_or_compares_refuses_made_up_episodes(library, command, capsys):
    assert main([*command, "--store", "store", "--no-prefect"]) == 2
    assert "made-up episodes" in capsys.readouterr().err


def test_real_and_made_up_episodes_never_share_a_dataset(library, tmp_path):
    request = DatagenRequest(matrix="tiny", store="store", dataset="tiny-skeleton", workers=0)
    with pytest.raises(SpecError, match="holds made-up episodes, and real ones never join them"):
        request.check()
    matrix, plans = plan_matrix("tiny")
    with tiny.context(tmp_path, stand_in.synthetic) as context:
        assert isinstance(context, Context)
        context.commit(stand_in.synthetic(stand_in.plans(1)[0]))
        with pytest.raises(SpecError, match="holds real episodes, and made-up ones never join them"):
            generate(context, matrix, plans, skeleton=True)
        with pytest.raises(SpecError, match="real episodes"):
            context.commit(skeleton_cohort(plans[0]))


def test_a_skeleton_is_marked_wherever_a_dataset_is_listed(library, capsys):
    assert main(["dataset", "ls", "--store", "store"]) == 0
    assert main(["dataset", "show", "tiny-skeleton", "--store", "store"]) == 0
    said = capsys.readouterr().out
    assert said.lower().count("skeleton") > said.count("tiny-skeleton")
