from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import tiny
from engine_specs import plan_of, tiny_environment
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, behaviour
from esper.leyline.errors import SpecError
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.leyline.schema import deterministic_columns
from esper.tolaria.memory import cohort_memory
from esper.tolaria.rollout import CohortRun, run_cohort
from flows.datagen import DatagenRequest, generate, run_datagen
from flows.orchestration import LocalOrchestrator
from flows.planning import plan_matrix, slices
from flows.preview import preview

EPISODES = [
    *(PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(3)),
    *(PlannedEpisode(controller=behaviour("early-intervener"), epsilon=e) for e in (0.0, 0.6)),
    PlannedEpisode(controller=FixedSchedule(name="one", plants=(Plant(slot=0, blueprint="conv_light"),))),
]


def with_branches() -> CohortPlan:
    """Six episodes, branches from two of them, and one from an episode that is not among them."""
    stranger = PlannedEpisode(controller=NeverAct(), repetition=7)
    wait = ((0,) * 8,)
    branches = [
        PlannedBranch(parent=parent, step=step, forced=wait, then=PlannedEpisode(controller=NeverAct()))
        for parent, step in ((EPISODES[0], 1), (EPISODES[5], 2), (EPISODES[5], 0), (stranger, 1))
    ]
    small = tiny_environment(horizon=4, batches_per_epoch=1)
    return plan_of(EPISODES, small).model_copy(update={"branches": tuple(branches)})


@settings(max_examples=60, deadline=None)
@given(max_lineages=st.integers(2, 12), kept=st.sets(st.integers(0, 5)), branched=st.booleans())
def test_every_episode_and_branch_is_in_one_slice_which_holds_its_parents_and_no_more_than_allowed(
    max_lineages, kept, branched
):
    plan = with_branches()
    plan = plan.model_copy(update={"episodes": tuple(EPISODES[index] for index in sorted(kept))})
    plan = plan if branched else plan.model_copy(update={"branches": ()})
    parts = slices(plan, max_lineages)
    assert sorted(name for part in parts for name in part.planned_ids()) == sorted(plan.planned_ids())
    for part in parts:
        running = {*part.episode_ids(), *(part.identity(branch.parent).episode_id for branch in part.branches)}
        assert 1 <= len(running) <= max_lineages - 1
    parents = [{part.identity(branch.parent).episode_id for branch in part.branches} for part in parts]
    assert sum(map(len, parents)) == len(set().union(*parents)), "a parent runs once"


def test_without_a_limit_a_plan_stays_whole():
    plan = with_branches()
    assert slices(plan, None) == [plan]
    assert [len(part.episodes) for part in slices(plan.model_copy(update={"branches": ()}), 7)] == [6]


def rows(tables: list[dict[str, pa.Table]]) -> dict[str, pa.Table]:
    keys = {"steps": [("episode_id", "ascending"), ("step", "ascending")], "episodes": [("episode_id", "ascending")]}
    joined = {name: pa.concat_tables([part[name] for part in tables]) for name in keys}
    return {
        name: table.select(deterministic_columns(name)).sort_by(keys[name]).combine_chunks()
        for name, table in joined.items()
    }


@pytest.fixture(scope="module")
def whole():
    return rows([run_cohort(with_branches())])


@pytest.mark.parametrize("max_lineages", [2, 3, 5])
def test_slices_give_the_rows_of_the_whole_cohort_branches_included(whole, max_lineages):
    assert rows([run_cohort(part) for part in slices(with_branches(), max_lineages)]) == whole


@pytest.mark.parametrize("max_lineages", [2, 4, 7])
def test_no_slice_ever_holds_more_lineages_than_allowed_and_one_that_is_being_forked(max_lineages, monkeypatch):
    held = []
    from esper.tolaria import transitions

    fork = transitions._fork

    def counting(flock, *args):
        fork(flock, *args)
        held.append(len(flock.lineages) - 1)

    monkeypatch.setattr(transitions, "_fork", counting)
    for part in slices(plan_of(EPISODES), max_lineages):
        CohortRun.of(part, watch=lambda cohort, applied: held.append(len(cohort.flock.lineages)))
    assert max(held) <= max_lineages
    assert max(held) >= min(max_lineages, 3), "the episodes do fork"


@pytest.fixture
def library(tmp_path, monkeypatch):
    tiny.write_library(tmp_path, replicates=2, horizon=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_digest_does_not_depend_on_the_slices(library):
    matrix, plans = plan_matrix("tiny")
    digests = set()
    for limit in (None, 2, 3):
        with tiny.context(library / str(limit), run_cohort) as context:
            generated = generate(context, matrix, plans, max_lineages=limit)
        digests.add(generated.version.manifest.digest)
    assert len(digests) == 1


def test_less_than_an_episode_beside_the_trunk_is_a_usage_error():
    with pytest.raises(SpecError, match="--max-lineages 1\n  expected: 2 or more"):
        slices(with_branches(), 1)
    with pytest.raises(SpecError, match="max_lineages"):
        DatagenRequest.parse({"matrix": "tiny", "max_lineages": 1})


def test_memory_falls_with_the_limit_and_is_that_of_the_largest_slice(library):
    request = DatagenRequest(matrix="tiny", store=str(library))
    bounds = [preview(request.model_copy(update={"max_lineages": limit})).memory() for limit in (2, 3, None)]
    assert [bound.num_lineages for bound in bounds] == [3, 4, 6]
    assert bounds[0].total_bytes < bounds[1].total_bytes < bounds[2].total_bytes
    assert replace(bounds[2], num_lineages=3) == bounds[0]


def test_a_request_in_slices_runs_to_a_sealed_version(library):
    request = DatagenRequest(matrix="tiny", store=str(library / "store"), workers=0, max_lineages=2)
    generated = run_datagen(request, LocalOrchestrator(1))
    assert (generated.new_episodes, generated.failed_episodes) == (8, 0)
    assert cohort_memory(slices(plan_matrix("tiny")[1][0], 2)[0]).num_lineages == 3
