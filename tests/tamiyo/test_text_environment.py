"""Every controller drives a transformer on stories, and what it planted is told by the transformer's names."""

from __future__ import annotations

import pytest

from esper.karn.catalogue import connect, query
from esper.karn.health_page_data import read_page_data
from esper.karn.store import open_store
from esper.leyline.actions import BLENDS, TRANSFORMER_BLUEPRINTS, Blend
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS, FixedSchedule, NeverAct, Plant
from esper.leyline.library import load
from esper.leyline.matrix import Branch, Cell, CohortPlan, PlannedEpisode, plan_episodes
from esper.leyline.plans import plan_branch
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec, TinyStoriesTask, TransformerHost
from esper.simic.schedules import candidate_schedules
from esper.tolaria.rollout import run_cohort
from quality import values
from quality.working import prepare

TEXT = EnvironmentSpec(
    name="tiny-stories",
    task=TinyStoriesTask(context=8, vocabulary=64, rows=(48, 16, 16)),
    host=TransformerHost(layers=3, heads=2, embed=8, slots=3),
    learning_rate=0.1,
    batch_size=8,
    batches_per_epoch=2,
    horizon=12,
    slots=("mid", "late"),
)
REWARD = load("rewards", "digits-gap", RewardSpec)
SCHEDULE = FixedSchedule(
    name="gated", plants=(Plant(slot=1, blueprint="gated_mlp", blend=Blend.GATED), Plant(slot=2, blueprint="lora"))
)
BRANCH = Branch.model_validate(
    {
        **{"environment": TEXT.name, "reward": "digits-gap", "replicate": 0, "step": 2},
        "action": {"op": "GERMINATE", "slot": 1, "blueprint": "conv"},
    }
)


@pytest.fixture(scope="module")
def tables():
    cell = Cell(environment=TEXT.name, reward="digits-gap", epsilons=(0.0,), explorers=18, replicates=1)
    others = (PlannedEpisode(controller=SCHEDULE), PlannedEpisode(controller=NeverAct()))
    return run_cohort(
        CohortPlan(
            environment=TEXT,
            reward=REWARD,
            replicate=0,
            episodes=(*plan_episodes(cell, TEXT, pool="text"), *others),
            branches=(plan_branch(BRANCH, TEXT),),
        )
    )


@pytest.fixture(scope="module")
def version(tables, tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("text")
    dataset.commit(tables)
    return dataset.seal(matrix_id="m", provenance={})


def test_every_behaviour_explorers_a_schedule_and_never_act_run_to_the_end(tables):
    episodes = tables["episodes"].to_pylist()
    assert {row["outcome"] for row in episodes} == {"completed"}
    controllers = {row["controller"] for row in episodes}
    assert controllers == {*ELEVEN_BEHAVIOURS, "schedule-sampler", "gated", "never-act", "complete"}
    germinated = {row["controller"] for row in episodes if row["num_germinate"]}
    assert germinated >= {"schedule-sampler", "gated", "complete", "random", "periodic", "blueprint-explorer"}
    gated = next(row for row in episodes if row["controller"] == "gated")
    assert gated["num_fossils"] == 2


def test_no_seed_is_born_in_a_slot_that_may_not_be_used_and_explorers_draw_gates_too(tables):
    rows = [row for row in tables["steps"].to_pylist() if row["op"] == "GERMINATE"]
    assert {row["action_slot"] for row in rows} == {1, 2}
    sampled = {row["action_blend"] for row in rows if row["actor"] == "schedule-sampler"}
    assert BLENDS.index(Blend.GATED) in sampled
    assert {row["action_isolation"] for row in rows if row["actor"] == "baseline"} <= {1}


def test_the_decisions_name_the_blueprints_of_the_transformer(version):
    found = query(
        version, "SELECT DISTINCT op, blueprint, actor FROM decisions WHERE blueprint IS NOT NULL"
    ).to_pylist()
    assert {row["blueprint"] for row in found} <= set(TRANSFORMER_BLUEPRINTS)
    assert {row["blueprint"] for row in found if row["actor"] == "gated"} == {"gated_mlp", "lora"}
    by_complete = {(row["op"], row["blueprint"]) for row in found if row["actor"] == "complete"}
    assert by_complete >= {("ADVANCE", "conv"), ("FOSSILIZE", "conv")}


def test_health_names_the_blueprints_of_the_transformer(version):
    connection = connect(version)
    try:
        prepare(connection)
        counts = values.value_counts(connection)
    finally:
        connection.close()
    names = [count.value for count in counts if count.head == "blueprint"]
    assert names == list(TRANSFORMER_BLUEPRINTS)
    assert read_page_data(version, {}).coverage[TEXT.name].blueprints == TRANSFORMER_BLUEPRINTS


def test_the_candidates_for_the_best_schedule_are_the_counterparts_in_the_slots_that_may_be_used():
    schedules = candidate_schedules(TEXT, limit=100)
    plants = [plant for schedule in schedules for plant in schedule.plants]
    assert {plant.blueprint for plant in plants} == {"mlp", "mlp_small", "conv", "lora_large"}
    assert {plant.slot for plant in plants} == {1, 2}
    assert schedules[0].name == "mlp-s1-e0"
