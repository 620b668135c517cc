from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from engine_specs import plan_of, tiny_environment

from esper.leyline.actions import WAIT_ROW
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, ScheduleSampler, behaviour
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.schema import deterministic_columns
from esper.tolaria.branching import branch_episode
from esper.tolaria.rollout import CohortRun, run_cohort

NAMES = ("baseline", "early-intervener", "aggressive", "anti-kasmina", "periodic", "blueprint-explorer")


def row_of_31() -> list[PlannedEpisode]:
    planned = [PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(3)]
    for name in NAMES:
        planned += [PlannedEpisode(controller=behaviour(name), epsilon=e) for e in (0.0, 0.3, 0.6, 0.9)]
    sampler = ScheduleSampler(pool="test", num_plans=30, num_slots=3, max_birth_epoch=3)
    planned += [PlannedEpisode(controller=sampler, repetition=r) for r in (2, 17, 23)]
    schedule = FixedSchedule(name="one", plants=(Plant(slot=1, blueprint="conv_heavy"),))
    return [*planned, PlannedEpisode(controller=schedule)]


def deterministic(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    keys = {"steps": [("episode_id", "ascending"), ("step", "ascending")], "episodes": [("episode_id", "ascending")]}
    wanted = {name: deterministic_columns(name) for name in keys}
    return {name: tables[name].select(wanted[name]).sort_by(keys[name]).combine_chunks() for name in keys}


def joined(parts: list[dict[str, pa.Table]]) -> dict[str, pa.Table]:
    return {name: pa.concat_tables([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def whole() -> dict[str, pa.Table]:
    return deterministic(run_cohort(plan_of(row_of_31())))


def test_the_same_plan_gives_the_same_bytes_twice(whole):
    assert deterministic(run_cohort(plan_of(row_of_31()))) == whole


@pytest.mark.parametrize("size", [1, 3])
def test_rows_do_not_depend_on_the_size_of_the_cohort(whole, size):
    episodes = row_of_31()
    assert len(episodes) == 31
    groups = [episodes[start : start + size] for start in range(0, len(episodes), size)]
    assert deterministic(joined([run_cohort(plan_of(group)) for group in groups])) == whole


def test_rows_with_equal_state_id_have_equal_observations_and_masks(whole):
    steps = whole["steps"]
    assert pc.count_distinct(steps["state_id"]).as_py() < steps.num_rows
    observed = steps.select(["state_id", "step", "tree_mask", *FEATURE_COLUMNS])
    assert (
        observed.group_by(observed.column_names).aggregate([]).num_rows == pc.count_distinct(steps["state_id"]).as_py()
    )


def test_no_row_holds_a_number_that_is_not_finite(whole):
    for name in whole["steps"].column_names:
        column = whole["steps"][name]
        if pa.types.is_floating(column.type):
            assert pc.all(pc.is_finite(column.drop_null())).as_py() is not False, name


def test_a_branch_that_repeats_the_actions_equals_the_full_episode_byte_for_byte():
    episodes = [
        PlannedEpisode(controller=FixedSchedule(name="plan", plants=(Plant(slot=0, blueprint="conv_light"),))),
        PlannedEpisode(controller=behaviour("random"), epsilon=1.0),
    ]
    run = CohortRun.of(plan_of(episodes, tiny_environment(horizon=12)), keep_snapshots=True)
    tables = run.recorder.tables("here")
    by_choice = {"episode_id", "actor", "replayed", "behaviour_logp", "op_probs", "epsilon", "plan"}
    same = [name for name in deterministic_columns("steps") if name not in by_choice]
    for index, identity in enumerate(run.recorder.identities):
        mine = tables["steps"].filter(pc.field("episode_id") == identity.episode_id)
        taken = [np.array(row, dtype=np.int8) for row in run.cohort.riders[index].submitted_rows]
        for step in (0, 3, 7, 11):
            branch = branch_episode(run, index, step, taken[step:], PlannedEpisode(controller=NeverAct()))
            assert branch["steps"].select(same) == mine.select(same)
            assert branch["steps"]["replayed"].to_pylist() == [t < step for t in range(13)]
            assert branch["steps"]["behaviour_logp"].slice(step).null_count == 13 - step
            assert branch["episodes"]["branch_parent"].to_pylist() == [identity.episode_id]


def test_a_branch_takes_the_forced_action_and_then_its_own_way():
    run = CohortRun.of(plan_of([PlannedEpisode(controller=NeverAct())]), keep_snapshots=True)
    plant = FixedSchedule(name="after", plants=(Plant(slot=2, blueprint="norm", birth_epoch=3),))
    branch = branch_episode(run, 0, 2, [WAIT_ROW], PlannedEpisode(controller=plant))
    ops = branch["steps"]["op"].to_pylist()
    assert ops[:5] == ["WAIT", "WAIT", "WAIT", "GERMINATE", "ADVANCE"]
    assert branch["steps"]["behaviour_logp"].to_pylist()[:5] == [0.0, 0.0, None, 0.0, 0.0]
    assert branch["steps"]["actor"].to_pylist()[:4] == ["never-act", "never-act", "after", "after"]
