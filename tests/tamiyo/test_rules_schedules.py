"""Fixed schedules and the pool of plans."""

import numpy as np
import pytest
from scripted import Script, World, environment, episode, observe, run_block, run_one, text_environment

from esper.leyline.actions import BLENDS, CNN_BLUEPRINTS, TRANSFORMER_BLUEPRINTS, Isolation, Op
from esper.leyline.controller_specs import FixedSchedule, Plant, ScheduleSampler
from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.stages import Stage
from esper.tamiyo.plans import declared_plans, plant_row, pool_plan, pool_plans
from esper.tamiyo.registry import build_controller

POOL = ScheduleSampler(pool="demo", num_plans=60, num_slots=3, max_birth_epoch=10)


def schedule(*plants: Plant) -> FixedSchedule:
    return FixedSchedule(name="plan", plants=plants)


def test_a_whole_plan_is_carried_out_one_action_a_step():
    plan = schedule(
        Plant(slot=2, blueprint="conv_heavy", birth_epoch=0, dwell_epochs=2, tempo_epochs=5),
        Plant(slot=0, blueprint="norm", birth_epoch=2),
    )
    events, rows = run_one(build_controller(plan))
    assert events == [
        (0, "GERMINATE", 2),
        (2, "GERMINATE", 0),
        (3, "ADVANCE", 0),
        (4, "ADVANCE", 2),
        (6, "FOSSILIZE", 0),
        (9, "FOSSILIZE", 2),
    ]
    assert CNN_BLUEPRINTS[rows[0][2]] == "conv_heavy"
    assert CNN_BLUEPRINTS[rows[2][2]] == "norm"


def test_a_plan_ignores_what_is_measured():
    plan = schedule(Plant(slot=0, blueprint="conv_light", birth_epoch=1))
    bad = Script(plateau=lambda step: 0, improvement=lambda *_: -9.0, removal_cost=lambda *_: -9.0)
    assert run_one(build_controller(plan), bad)[0] == run_one(build_controller(plan))[0]


def test_the_plant_that_is_due_longest_comes_first():
    plan = schedule(*(Plant(slot=slot, blueprint="norm", birth_epoch=2 - slot, dwell_epochs=5) for slot in range(3)))
    late = World(environment(), step=4)
    actions, _ = run_block(build_controller(plan), [late], [episode()], horizon=3)
    assert [int(row[1]) for row in actions[:, 0]] == [2, 1, 0]


def test_a_plant_whose_slot_is_taken_is_passed_over_and_the_rest_goes_on():
    plan = schedule(
        Plant(slot=0, blueprint="norm"), Plant(slot=0, blueprint="conv_light"), Plant(slot=1, blueprint="attention")
    )
    events, _ = run_one(build_controller(plan))
    assert [event for event in events if event[1] == "GERMINATE"] == [(0, "GERMINATE", 0), (1, "GERMINATE", 1)]
    assert [event[2] for event in events if event[1] == "FOSSILIZE"] == [0, 1]


def test_a_pruned_seed_is_not_planted_again():
    world = World(environment())
    controller = build_controller(schedule(Plant(slot=0, blueprint="norm")))
    first, decisions = run_block(controller, [world], [episode()], horizon=1)
    assert first[0, 0, 0] == Op.GERMINATE
    world.stage[0], world.levers[0] = Stage.DORMANT, -1
    assert not controller.act(observe([world]), decisions[-1].carry).actions_NA.any()


def test_a_germination_that_somebody_else_overruled_is_tried_again():
    world = World(environment())
    controller = build_controller(schedule(Plant(slot=0, blueprint="norm")))
    decision = controller.act(observe([world]), controller.start([episode()]))
    world.apply(np.zeros(8, dtype=np.int8))
    assert controller.act(observe([world]), decision.carry).actions_NA[0, 0] == Op.GERMINATE


class Barred(World):
    """A world in which a strict gate turns the seeds of some slots away for ever."""

    bars = frozenset()

    def apply(self, row: np.ndarray) -> None:
        self.script.refuses = lambda op: (op, int(row[1])) in self.bars
        super().apply(row)


@pytest.mark.parametrize(
    "bars", [{(Op.ADVANCE, 0)}, {(Op.FOSSILIZE, 0)}, {(Op.ADVANCE, 0), (Op.FOSSILIZE, 1)}, {(Op.ADVANCE, 1)}]
)
def test_a_seed_that_a_gate_turns_away_for_ever_keeps_no_other_waiting(bars):
    world = Barred(environment(num_slots=4))
    world.bars = frozenset(bars)
    plan = schedule(*(Plant(slot=slot, blueprint="norm") for slot in range(4)))
    actions, _ = run_block(build_controller(plan), [world], [episode(world.env)], horizon=40)
    stuck = {slot for _, slot in bars}
    assert {slot for slot, stage in enumerate(world.stage[:4]) if stage is not Stage.FOSSILIZED} == stuck
    tried = {(Op(int(row[0])), int(row[1])) for row in actions[:, 0]}
    assert bars <= tried, "a refusal is no verdict for good: it is asked again"


def test_isolation_by_topology_is_the_environments_default():
    plant = Plant(slot=0, blueprint="norm")
    for isolation in Isolation:
        row = plant_row(plant, environment(default_isolation=isolation))
        assert row[6] == list(Isolation).index(isolation)


def test_levers_that_the_environment_lacks_become_the_nearest():
    row = plant_row(Plant(slot=0, blueprint="norm", tempo_epochs=12, blend="sigmoid-1"), environment(tempos=(3, 5)))
    assert row[4] == 1
    assert BLENDS[row[3]] == "sigmoid-1"


def test_a_plant_in_a_slot_that_the_host_lacks_is_an_error():
    with pytest.raises(SpecError, match="slot 3"):
        build_controller(schedule(Plant(slot=3, blueprint="norm"))).start([episode()])


def test_the_declared_plans_are_light_and_heavy_in_each_slot_and_in_all_at_two_epochs():
    plans = declared_plans(3, environment())
    assert len(plans) == 16
    assert len(set(plans)) == 16
    found = {(plan[0].blueprint, tuple(p.slot for p in plan), plan[0].birth_epoch) for plan in plans}
    assert found == {
        (blueprint, slots, epoch)
        for blueprint in ("conv_light", "conv_heavy")
        for slots in ((0,), (1,), (2,), (0, 1, 2))
        for epoch in (0, 2)
    }


def test_sampled_plans_have_distinct_slots_and_stay_in_the_bounds_of_the_environment():
    env = environment(tempos=(3, 8), isolations=("isolated",), default_isolation="isolated")
    plans = [pool_plan(POOL, index, env) for index in range(16, 60)]
    assert {len(plan) for plan in plans} == {1, 2, 3}
    plants = [plant for plan in plans for plant in plan]
    assert all(len({plant.slot for plant in plan}) == len(plan) for plan in plans)
    assert {plant.birth_epoch for plant in plants} <= set(range(11))
    assert len({plant.birth_epoch for plant in plants}) > 5
    assert {plant.tempo_epochs for plant in plants} == {3, 8}
    assert {plant.isolation for plant in plants} == {"isolated"}
    assert {plant.blueprint for plant in plants} == set(CNN_BLUEPRINTS)
    assert {plant.blend for plant in plants} == set(BLENDS)


def test_a_pool_plans_in_the_names_of_the_topology_and_in_the_slots_that_may_be_used():
    env = text_environment(6, slots=("slot1", "mid", "late"))
    plants = [plant for index in range(60) for plant in pool_plan(POOL, index, env)]
    assert {plant.slot for plant in plants} == {1, 3, 5}
    assert {plant.blueprint for plant in plants} == set(TRANSFORMER_BLUEPRINTS)
    declared = [plan[0].blueprint for plan in declared_plans(3, env)]
    assert set(declared) == {"mlp_small", "mlp"}
    on_all = environment(3)
    for index in range(16, 60):
        here, there = pool_plan(POOL, index, env), pool_plan(POOL, index, on_all)
        assert [plant.slot for plant in here] == [(1, 3, 5)[plant.slot] for plant in there]
    starts = [episode(env, repetition=index) for index in range(0, 60, 7)]
    actions, _ = run_block(build_controller(POOL), [World(env) for _ in starts], starts)
    assert {Op.GERMINATE, Op.ADVANCE, Op.FOSSILIZE} <= set(actions[:, :, 0].ravel().tolist())


def test_a_plant_of_the_other_topology_is_refused_and_told_its_counterpart():
    plan = build_controller(schedule(Plant(slot=0, blueprint="conv_heavy")))
    with pytest.raises(UnknownNameError, match="its counterpart there is 'mlp'"):
        plan.start([episode(text_environment())])
    with pytest.raises(UnknownNameError, match="its counterpart there is 'conv_small'"):
        build_controller(schedule(Plant(slot=0, blueprint="lora"))).start([episode()])


def test_a_plant_in_a_slot_that_may_not_be_used_is_an_error():
    env = environment(slots=("mid", "late"))
    with pytest.raises(SpecError, match="one of the slots 1, 2"):
        build_controller(schedule(Plant(slot=0, blueprint="norm"))).start([episode(env)])


def test_plans_are_equal_on_every_env_seed_and_depend_on_pool_and_index():
    env = environment()
    first, second = ([pool_plan(POOL, index, env) for index in range(60)] for _ in range(2))
    assert first == second
    assert len(set(first[16:])) == 44
    other = ScheduleSampler(pool="other", num_plans=60, num_slots=3, max_birth_epoch=10)
    assert [pool_plan(other, index, env) for index in range(60)][16:] != first[16:]
    controller = build_controller(POOL)
    starts = [episode(replicate=replicate, repetition=20) for replicate in (0, 5, 100_000)]
    actions, _ = run_block(controller, [World(env) for _ in starts], starts)
    for other_row in (1, 2):
        np.testing.assert_array_equal(actions[:, 0], actions[:, other_row])


def test_a_plan_does_not_depend_on_how_many_the_pool_has():
    longer = ScheduleSampler(pool="demo", num_plans=500, num_slots=3, max_birth_epoch=10)
    assert pool_plan(longer, 30, environment()) == pool_plan(POOL, 30, environment())


def test_the_sampler_does_what_the_fixed_schedule_of_its_plan_does():
    env, controller = environment(), build_controller(POOL)
    for index, fixed in enumerate(pool_plans(POOL, env)[:24]):
        assert run_one(controller, start=episode(repetition=index))[0] == run_one(build_controller(fixed))[0]


def test_rows_of_the_sampler_carry_a_plan_and_no_propensity():
    starts = [episode(repetition=index) for index in (0, 17)]
    _, decisions = run_block(build_controller(POOL), [World(environment()) for _ in starts], starts, horizon=3)
    for decision in decisions:
        assert list(decision.plan_N) == [0, 17]
        assert np.isnan(decision.logp_N).all()
        assert np.isnan(decision.op_probs).all()


def test_a_repetition_beyond_the_pool_is_an_error():
    with pytest.raises(SpecError, match="0 to 59"):
        build_controller(POOL).start([episode(repetition=60)])


def test_a_pool_for_more_slots_than_the_host_has_is_an_error():
    with pytest.raises(SpecError, match="slots"):
        build_controller(POOL).start([episode(environment(2))])
