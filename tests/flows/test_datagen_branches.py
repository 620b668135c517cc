"""Branchings through data generation: resumed, never run twice, and failing one by one."""

from __future__ import annotations

import pyarrow.compute as pc
import pytest
import tiny

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.verdict import Level
from esper.tolaria.workers import cohort_engine
from flows.datagen import generate
from flows.planning import Selection, computed_epochs, estimate, one_by_one, plan_matrix, remaining

BRANCH = """
[[branches]]
environment = "tiny"
reward = "tiny"
replicate = {replicate}
step = {step}
parent = {{ controller = "{parent}" }}
action = {action}
"""
PLANT = '{ op = "GERMINATE", slot = 1, blueprint = "norm" }'


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tiny.write_library(tmp_path, replicates=2, horizon=6)
    text = (root / "matrices" / "tiny.toml").read_text()
    text += BRANCH.format(replicate=0, step=1, parent="never-act", action=PLANT)
    text += BRANCH.format(replicate=0, step=3, parent="baseline", action='{ op = "WAIT" }')
    text += BRANCH.format(replicate=4, step=2, parent="baseline", action=PLANT)
    (root / "matrices" / "grown.toml").write_text(text.replace('name = "tiny"', 'name = "grown"', 1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _generate(folder, name="grown", engine=cohort_engine, workers=0, **options):
    matrix, plans = plan_matrix(name)
    with tiny.context(folder, engine, workers=workers) as context:
        return generate(context, matrix, plans, **options)


def _episodes(version):
    return version.table("episodes").to_pylist()


def test_branches_and_their_parents_are_stored_with_the_cells(library):
    generated = _generate(library)
    _, plans = plan_matrix("grown")
    held = _episodes(generated.version)
    assert sorted(row["episode_id"] for row in held) == sorted(name for plan in plans for name in plan.planned_ids())
    branches = [row for row in held if row["branch_parent"] is not None]
    assert {row["role"] for row in branches} == {"data"}
    assert {row["branch_parent"] for row in branches} <= {row["episode_id"] for row in held}
    steps = generated.version.table("steps", filter=pc.field("episode_id") == branches[0]["episode_id"])
    assert steps["replayed"].to_pylist() == [step < branches[0]["branch_step"] for step in range(7)]


def test_branches_join_a_dataset_whose_episodes_are_not_run_again(library):
    path = library / "datasets" / "matrices" / "grown.toml"
    whole = path.read_text()
    path.write_text(whole[: whole.index("[[branches]]")])
    first = _generate(library)
    path.write_text(whole)
    later = _generate(library)
    assert first.new_episodes == 8
    assert later.new_episodes == 5  # three branches, the trunk of replicate 0, the baseline of replicate 4
    assert _generate(library).new_episodes == 0
    assert later.version.manifest.digest == _generate(library / "clean").version.manifest.digest


def test_a_version_that_grew_by_one_environment_still_names_the_others(library):
    environments = library / "datasets" / "environments"
    text = (environments / "tiny.toml").read_text().replace('name = "tiny"', 'name = "other"')
    (environments / "other.toml").write_text(text)
    _generate(library, "tiny")
    (library / "datasets" / "matrices" / "second.toml").write_text(
        'name = "second"\n'
        + BRANCH.format(replicate=0, step=1, parent="never-act", action=PLANT).replace(
            'environment = "tiny"', 'environment = "other"'
        )
    )
    said = _generate(library, "second").version.manifest.provenance
    assert set(said["environments"]) == set(said["rewards"]) == {"tiny", "other"}


def test_two_workers_give_the_same_digest(library):
    here, there = _generate(library / "one"), _generate(library / "two", workers=2)
    assert here.version.manifest.digest == there.version.manifest.digest


def test_what_remains_leaves_out_branches_that_exist(library):
    _, plans = plan_matrix("grown")
    first = plans[0]
    rest = remaining(plans[:1], {*first.episode_ids(), first.branch_ids()[0]})
    assert [(plan.episodes, plan.branch_ids()) for plan in rest] == [((), first.branch_ids()[1:])]
    assert remaining(plans[:1], first.planned_ids()) == []
    parts = one_by_one(first)
    assert [name for part in parts for name in part.planned_ids()] == first.planned_ids()
    assert [len(part.branches) for part in parts] == [0, 1, 1]


def test_a_branch_that_cannot_be_carried_out_fails_alone_and_says_why(library):
    path = library / "datasets" / "matrices" / "grown.toml"
    path.write_text(
        path.read_text() + BRANCH.format(replicate=0, step=2, parent="never-act", action='{ op = "PRUNE", slot = 0 }')
    )
    generated = _generate(library)
    assert generated.failed_episodes == 1
    (failed,) = (row for row in _episodes(generated.version) if row["outcome"] == "failed")
    assert failed["branch_step"] == 2
    assert failed["branch_parent"] in {row["episode_id"] for row in _episodes(generated.version)}
    assert "Op.PRUNE" in failed["error"]
    assert _generate(library).new_episodes == 0
    assert _generate(library, retry_failed=True).failed_episodes == 1


def test_a_selection_keeps_the_branches_whose_parents_it_keeps(library):
    chosen = Selection(behaviours=("baseline",), epsilons=(0.0,))
    matrix, plans = plan_matrix("grown", chosen)
    assert [branch.parent.controller for branch in matrix.branches] == ["baseline", "baseline"]
    _, short = plan_matrix("grown", Selection(max_epochs=3))
    assert [branch.step for plan in short for branch in plan.branches] == [1, 2]
    assert [plan.replicate for plan in plans] == [0, 1, 4]


def test_the_cost_of_branches_counts_what_is_computed_again(library):
    _, plans = plan_matrix("grown")
    dataset = open_store(library / "store").dataset("tiny")
    assert (estimate(plans, dataset).episodes, estimate(plans, dataset).branches) == (13, 3)
    only = one_by_one(plans[0])[1]
    steps = cohort_engine(only)["steps"]
    trunk, parent, again = 6, 6, 6
    own = sum(key != steps["host_key"][0].as_py() for key in steps["host_key"].to_pylist())
    assert computed_epochs(only, steps) == trunk + parent + again + own


def test_a_dry_run_counts_the_branches(library, capsys):
    assert main(["datagen", "--matrix", "grown", "--dry-run", "--store", "store"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "13"
    assert lines[1][-2:] == ["branches", "3"]


def test_what_health_suggests_raises_what_failed_once_it_is_generated(library):
    from quality.checking import check
    from quality.suggest import suggest, to_toml

    (library / "datasets" / "matrices" / "poor.toml").write_text(
        'name = "poor"\n[[cells]]\nenvironment = "tiny"\nreward = "tiny"\n'
        'behaviours = ["baseline", "conservative"]\nepsilons = [0.0]\nreplicates = 3\n'
    )
    before = _generate(library, "poor").version
    judged = check(before, docs_dir=library / "docs")
    suggestion = suggest(before, judged, max_episodes=30)
    (library / "remedy.toml").write_text(to_toml(suggestion))
    grown = _generate(library, "remedy.toml")
    assert grown.new_episodes == suggestion.episodes
    assert grown.failed_episodes == 0
    now = {c.name: c.value for c in judged.checks if c.environment == "all"}
    after = {c.name: c.value for c in check(grown.version, docs_dir=library / "docs").checks if c.environment == "all"}
    blocked = [row.check for row in suggestion.table if row.level is Level.BLOCK and row.environment == "all"]
    assert {"action_coverage", "action_entropy"} <= set(blocked)
    assert after["action_entropy"] > now["action_entropy"]
    assert after["policy_diversity"] > now["policy_diversity"]
    assert after["single_action_clusters"] <= now["single_action_clusters"]
