"""Plans with branches, run by the engine: what is stored, and that it is what branching by hand gives."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from engine_specs import plan_of, tiny_environment

from esper.leyline.actions import Action, Op
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, behaviour
from esper.leyline.errors import LifecycleError, MaskError
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.leyline.plans import COMPLETE
from esper.leyline.schema import deterministic_columns
from esper.tolaria.branching import branch_episode
from esper.tolaria.rollout import CohortRun, run_cohort

ENVIRONMENT = tiny_environment(horizon=12)
TRUNK = PlannedEpisode(controller=NeverAct())
RANDOM = PlannedEpisode(controller=behaviour("random"), epsilon=1.0)
SEEDED = PlannedEpisode(controller=FixedSchedule(name="seeded", plants=(Plant(slot=0, blueprint="conv_light"),)))
END = PlannedEpisode(controller=COMPLETE)
PLANT = Action(op=Op.GERMINATE, slot=1, blueprint=7).to_row()


def branch(parent: PlannedEpisode, step: int, row, then: PlannedEpisode = END) -> PlannedBranch:
    return PlannedBranch(parent=parent, step=step, forced=(tuple(row.tolist()),), then=then)


def plan(*episodes: PlannedEpisode, branches: tuple[PlannedBranch, ...] = ()) -> CohortPlan:
    return plan_of(episodes, ENVIRONMENT).model_copy(update={"branches": branches})


def deterministic(tables: dict[str, pa.Table], name: str) -> dict[str, pa.Table]:
    return {
        table: tables[table].filter(pc.field("episode_id") == name).select(deterministic_columns(table))
        for table in ("steps", "episodes")
    }


BRANCHES = (branch(TRUNK, 2, PLANT), branch(RANDOM, 4, Action(op=Op.WAIT).to_row(), RANDOM))


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return run_cohort(plan(RANDOM, branches=BRANCHES))


def test_the_episodes_and_the_branches_are_stored_and_other_parents_are_not(tables):
    whole = plan(RANDOM, branches=BRANCHES)
    assert tables["episodes"]["episode_id"].to_pylist() == sorted(whole.planned_ids())
    assert set(tables["steps"]["episode_id"].to_pylist()) == set(whole.planned_ids())
    keys = list(zip(tables["steps"]["episode_id"].to_pylist(), tables["steps"]["step"].to_pylist()))
    assert keys == sorted(keys)


def test_a_branch_does_not_depend_on_what_else_the_plan_holds_nor_on_whether_its_parent_is_stored(tables):
    name = plan(branches=BRANCHES[:1]).planned_ids()[0]
    alone = run_cohort(plan(branches=BRANCHES[:1]))
    assert alone["episodes"].num_rows == 1
    assert deterministic(alone, name) == deterministic(tables, name)


def test_episodes_beside_branches_are_what_they_are_without(tables):
    name = plan(RANDOM).planned_ids()[0]
    assert deterministic(run_cohort(plan(RANDOM)), name) == deterministic(tables, name)


def test_a_planned_branch_is_the_branch_made_by_hand(tables):
    run = CohortRun.of(plan(TRUNK), keep_snapshots=True)
    by_hand = branch_episode(run, 0, 2, [PLANT], END)
    name = by_hand["episodes"]["episode_id"][0].as_py()
    assert deterministic(by_hand, name) == deterministic(tables, name)


def test_complete_carries_the_forced_seed_to_its_end(tables):
    name = plan(branches=BRANCHES[:1]).planned_ids()[0]
    steps = deterministic(tables, name)["steps"]
    assert steps["op"].to_pylist()[:4] == ["WAIT", "WAIT", "GERMINATE", "ADVANCE"]
    assert steps["replayed"].to_pylist() == [step < 2 for step in range(13)]
    assert steps["behaviour_logp"][2].as_py() is None
    episode = deterministic(tables, name)["episodes"]
    assert episode["num_fossils"].to_pylist() == [1]
    assert episode["branch_step"].to_pylist() == [2]
    assert episode["branch_parent"].to_pylist() == plan(TRUNK).episode_ids()
    assert episode["controller"].to_pylist() == ["complete"]


def test_replayed_rows_have_the_epsilon_of_who_acted_and_the_others_that_of_who_went_on():
    whole = plan(branches=(branch(RANDOM, 4, Action(op=Op.WAIT).to_row()),))
    steps = run_cohort(whole)["steps"]
    assert steps["epsilon"].to_pylist() == [1.0] * 4 + [0.0] * 9
    assert steps["actor"].to_pylist() == ["random"] * 4 + ["complete"] * 9
    assert steps["behaviour_logp"].null_count == 2  # the forced row and the final observation


def test_complete_carries_seeds_of_the_parent_to_their_end():
    waited = branch(SEEDED, 1, Action(op=Op.WAIT).to_row())
    steps = run_cohort(plan(branches=(waited,)))["steps"]
    assert steps["op"].to_pylist()[:3] == ["GERMINATE", "WAIT", "ADVANCE"]


def test_a_forced_action_that_its_state_does_not_allow_is_an_error_that_names_it():
    wrong = branch(TRUNK, 2, Action(op=Op.PRUNE, slot=0).to_row())
    with pytest.raises(MaskError, match=r"PRUNE.*at step 2"):
        run_cohort(plan(branches=(wrong,)))


def test_a_branch_beyond_the_end_of_its_parent_is_an_error():
    with pytest.raises(LifecycleError, match="cannot branch at step 12"):
        run_cohort(plan(branches=(branch(TRUNK, 12, PLANT),)))
