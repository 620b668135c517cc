"""What each of the eleven behaviours does and when, on scripted measurements."""

import numpy as np
import pytest
from scripted import NAN, Script, World, environment, episode, observe, run_block, run_one, text_environment

from esper.leyline.actions import (
    CNN_BLUEPRINTS,
    DWELL_EPOCHS,
    ISOLATIONS,
    TEMPO_EPOCHS,
    TRANSFORMER_BLUEPRINTS,
    Op,
)
from esper.leyline.blueprint_names import TRANSFORMER_COUNTERPARTS, counterpart
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS, HEURISTIC, Heuristic, NeverAct
from esper.leyline.errors import SpecError
from esper.leyline.stages import Stage
from esper.tamiyo.registry import build_controller

GOOD = Script()
POOR = Script(improvement=lambda slot, blueprint, epochs: -2.0)
MIDDLING = Script(improvement=lambda slot, blueprint, epochs: 0.0)
UNPAID = Script(removal_cost=lambda slot, blueprint, epochs: -1.0)
RISING = Script(plateau=lambda step: 0)


def events(name, script, **start):
    return run_one(build_controller(ELEVEN_BEHAVIOURS[name]), script, episode(**start))[0]


def of(op, found):
    return [(step, slot) for step, name, slot in found if name == op]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("baseline", 5),
        ("early-intervener", 3),
        ("late-intervener", 8),
        ("quick-culler", 5),
        ("patient-culler", 5),
        ("blueprint-explorer", 5),
        ("aggressive", 3),
        ("conservative", 8),
        ("periodic", 5),
    ],
)
def test_germinates_at_its_first_epoch_on_a_long_plateau(name, first):
    assert events(name, GOOD)[0] == (first, "GERMINATE", 0)


@pytest.mark.parametrize(("name", "plateau"), [("baseline", 3), ("early-intervener", 2), ("conservative", 5)])
def test_waits_until_the_plateau_is_long_enough(name, plateau):
    script = Script(plateau=lambda step: max(0, step - 9))
    assert events(name, script)[0] == (9 + plateau, "GERMINATE", 0)


@pytest.mark.parametrize("name", sorted(set(ELEVEN_BEHAVIOURS) - {"random", "anti-kasmina", "periodic"}))
def test_never_germinates_while_the_host_improves(name):
    assert events(name, RISING) == []


def test_baseline_lives_a_good_seed_from_birth_to_commitment_then_takes_the_next_slot():
    assert events("baseline", GOOD) == [
        (5, "GERMINATE", 0),
        (8, "ADVANCE", 0),
        (13, "FOSSILIZE", 0),
        (14, "GERMINATE", 1),
        (17, "ADVANCE", 1),
    ]


def test_a_seed_without_effect_is_advanced_at_the_age_of_judgement():
    assert of("ADVANCE", events("baseline", MIDDLING))[0] == (10, 0)


@pytest.mark.parametrize(
    ("name", "birth", "age"),
    [
        ("baseline", 5, 5),
        ("quick-culler", 5, 3),
        ("patient-culler", 5, 8),
        ("aggressive", 3, 3),
        ("conservative", 8, 8),
        ("anti-kasmina", None, 5),
        ("periodic", 5, 6),  # at epoch 10 it germinates first
    ],
)
def test_a_harmful_seed_is_pruned_at_the_age_of_judgement(name, birth, age):
    if name == "anti-kasmina":
        found, birth = events(name, Script(plateau=lambda step: 0, improvement=POOR.improvement)), 5
    else:
        found = events(name, POOR)
    assert found[0] == (birth, "GERMINATE", 0)
    assert of("PRUNE", found)[0] == (birth + age, 0)


def test_a_missing_improvement_counts_as_none():
    unmeasured = Script(improvement=lambda slot, blueprint, epochs: NAN)
    assert events("baseline", unmeasured) == events("baseline", MIDDLING)


def test_a_held_seed_that_does_not_pay_is_pruned():
    found = events("baseline", UNPAID)
    assert of("PRUNE", found)[0] == (13, 0)
    assert not of("FOSSILIZE", found)


@pytest.mark.parametrize("op", [Op.ADVANCE, Op.FOSSILIZE])
def test_a_seed_that_a_strict_gate_refuses_is_pruned_instead_of_asking_for_ever(op):
    found = events("baseline", Script(improvement=lambda slot, b, epochs: 0.0, refuses=lambda asked: asked is op))
    refused, pruned = of(op.name, found), of("PRUNE", found)
    assert refused
    assert pruned == [(step + 1, slot) for step, slot in refused]


def test_a_held_seed_is_kept_until_its_removal_cost_is_measured():
    late = Script(removal_cost=lambda slot, blueprint, epochs: NAN if epochs < 2 else 1.0)
    assert of("FOSSILIZE", events("baseline", late))[0] == (15, 0)


def test_anti_kasmina_germinates_while_the_host_improves_and_never_on_a_plateau():
    assert events("anti-kasmina", GOOD) == []
    assert events("anti-kasmina", RISING)[0] == (5, "GERMINATE", 0)


def test_anti_kasmina_prunes_what_pays_and_commits_what_does_not():
    paid = events("anti-kasmina", RISING)
    unpaid = events("anti-kasmina", Script(plateau=lambda step: 0, removal_cost=UNPAID.removal_cost))
    assert of("PRUNE", paid)[0] == (13, 0)
    assert not of("FOSSILIZE", paid)
    assert of("FOSSILIZE", unpaid)[0] == (13, 0)


@pytest.mark.parametrize("plateau", [0, 9])
def test_periodic_germinates_every_five_epochs_whatever_the_plateau_and_whatever_else_is_proposed(plateau):
    # improvement 50 scores ADVANCE far above the published score of GERMINATE
    script = Script(plateau=lambda step: plateau, improvement=lambda slot, b, epochs: 50.0 if epochs >= 5 else 0.0)
    found = events("periodic", script)
    assert of("GERMINATE", found) == [(5, 0), (10, 1), (15, 2)]
    assert of("ADVANCE", found)[0] == (11, 0)


def test_blueprints_rotate():
    _, rows = run_one(build_controller(ELEVEN_BEHAVIOURS["aggressive"]), POOR)
    planted = [CNN_BLUEPRINTS[row[2]] for row in rows if row[0] == Op.GERMINATE]
    assert planted == ["conv_light", "attention", "norm", "depthwise", "conv_light"]


def test_a_rotation_in_the_names_of_convolutions_stands_for_its_counterparts_on_a_transformer_and_the_reverse():
    _, rows = run_one(build_controller(ELEVEN_BEHAVIOURS["aggressive"]), POOR, episode(text_environment()))
    planted = [TRANSFORMER_BLUEPRINTS[row[2]] for row in rows if row[0] == Op.GERMINATE]
    assert planted == ["mlp_small", "attention", "norm", "conv", "mlp_small"]
    own = Heuristic(name="own", blueprints=("lora", "gated_mlp"))
    _, rows = run_one(build_controller(own), POOR)
    assert [CNN_BLUEPRINTS[row[2]] for row in rows if row[0] == Op.GERMINATE] == ["conv_small", "dilated", "conv_small"]


def test_counterparts_are_one_to_one():
    assert tuple(TRANSFORMER_COUNTERPARTS) == CNN_BLUEPRINTS
    assert set(TRANSFORMER_COUNTERPARTS.values()) == set(TRANSFORMER_BLUEPRINTS)
    for name, other in TRANSFORMER_COUNTERPARTS.items():
        assert counterpart(name, "transformer") == other
        assert counterpart(other, "cnn") == name


@pytest.mark.parametrize("name", sorted(ELEVEN_BEHAVIOURS))
def test_every_behaviour_plants_in_no_slot_that_may_not_be_used(name):
    env = text_environment(6, slots=("slot1", "late"))
    start = episode(env, epsilon=1.0 if name == "random" else 0.3, replicate=4)
    for script in (GOOD, POOR, RISING):
        found, _ = run_one(build_controller(ELEVEN_BEHAVIOURS[name]), script, start, horizon=40)
        assert {slot for _, slot in of("GERMINATE", found)} <= {1, 5}
        assert found


def test_where_every_gate_is_asked_a_good_seed_is_advanced_through_all_three():
    found, _ = run_one(build_controller(HEURISTIC), GOOD, episode(environment(ask_at_every_gate=True)))
    assert found[:5] == [
        (5, "GERMINATE", 0),
        (6, "ADVANCE", 0),
        (9, "ADVANCE", 0),
        (14, "ADVANCE", 0),
        (15, "FOSSILIZE", 0),
    ]


def test_the_default_levers_are_linear_tempo_five_dwell_three_at_the_hosts_rate():
    _, rows = run_one(build_controller(HEURISTIC), GOOD)
    birth = rows[5]
    assert (birth[3], TEMPO_EPOCHS[birth[4]], DWELL_EPOCHS[birth[5]], birth[7]) == (0, 5, 3, 1)


@pytest.mark.parametrize(
    ("env", "isolation"),
    [
        (environment(), "isolated"),
        (text_environment(), "coadapt"),
        (environment(default_isolation="coadapt"), "coadapt"),
        (text_environment(default_isolation="isolated"), "isolated"),
    ],
)
def test_the_isolation_is_the_environments_default_and_by_topology_where_it_says_nothing(env, isolation):
    _, rows = run_one(build_controller(HEURISTIC), GOOD, episode(env))
    assert ISOLATIONS[rows[5][6]] == isolation


def test_a_lever_value_that_the_environment_lacks_becomes_the_nearest():
    env = environment(tempos=(3, 12), dwells=(5,), seed_lr_factors=(2.0,))
    found, rows = run_one(build_controller(HEURISTIC), GOOD, episode(env))
    assert list(rows[5][4:6]) == [0, 3]
    assert rows[5][7] == 2
    assert of("ADVANCE", found)[0] == (10, 0), "an improvement does not shorten the dwell"


def test_blueprint_explorer_starts_at_its_replicate_and_cycles_slots_and_levers():
    controller = build_controller(ELEVEN_BEHAVIOURS["blueprint-explorer"])
    births = [run_one(controller, POOR, episode(replicate=replicate))[1][5] for replicate in range(11)]
    assert [row[2] for row in births] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert [row[1] for row in births[:6]] == [0, 1, 2, 0, 1, 2]
    for column in (3, 4, 5, 6, 7):
        assert len({int(row[column]) for row in births}) > 1
    _, rows = run_one(controller, POOR, episode(replicate=6))
    assert [int(row[2]) for row in rows if row[0] == Op.GERMINATE] == [6, 7, 0]


def test_an_unaffordable_blueprint_gives_way_to_the_next_in_the_rotation():
    controller = build_controller(HEURISTIC)
    world = World(environment(), GOOD, step=6)
    inputs = observe([world])
    mask = inputs.mask_NT.copy()
    mask[0, 29 + CNN_BLUEPRINTS.index("conv_light")] = False
    inputs = type(inputs)(columns=inputs.columns, step_N=inputs.step_N, mask_NT=mask, uniforms=inputs.uniforms)
    row = controller.act(inputs, controller.start([episode()])).actions_NA[0]
    assert (row[0], CNN_BLUEPRINTS[row[2]]) == (Op.GERMINATE, "attention")


def test_waits_where_fossils_are_used_up():
    env = environment(max_fossils=1)
    found = events("baseline", GOOD, env=env)
    assert of("FOSSILIZE", found) == [(13, 0)]


def test_no_germination_while_a_seed_is_blending():
    found = events("baseline", GOOD)
    assert not [step for step, _ in of("GERMINATE", found) if 5 < step <= 13]


def test_several_live_seeds_are_served_by_the_greatest_score():
    world = World(environment(), Script(improvement=lambda slot, b, epochs: float(slot + 1)), step=9)
    for slot in (0, 2):
        world.stage[slot], world.epochs[slot], world.levers[slot] = Stage.TRAINING, 4, (0, 0, 0, 0, 0, 0)
    controller = build_controller(HEURISTIC)
    decision = controller.act(observe([world]), controller.start([episode()]))
    assert list(decision.actions_NA[0][:2]) == [Op.ADVANCE, 2]


def test_all_behaviours_differ_on_some_script_and_ten_of_them_differ_from_baseline():
    scripts = [
        GOOD,
        POOR,
        MIDDLING,
        UNPAID,
        RISING,
        Script(plateau=lambda step: step % 4),
        Script(improvement=lambda slot, blueprint, epochs: -2.0 if epochs < 6 else 2.0),
    ]
    histories = {
        name: b"".join(run_one(build_controller(spec), script)[1].tobytes() for script in scripts)
        for name, spec in ELEVEN_BEHAVIOURS.items()
    }
    assert len(set(histories.values())) == 11
    for contrastive in ("anti-kasmina", "periodic"):
        assert histories[contrastive] != histories["baseline"]


def test_never_act_waits_with_certainty_and_refuses_noise():
    controller = build_controller(NeverAct())
    found, rows = run_one(controller, GOOD)
    assert found == []
    assert not rows.any()
    with pytest.raises(SpecError, match="never-act"):
        controller.start([episode(epsilon=0.1)])


def test_a_rows_decision_does_not_depend_on_its_neighbours():
    controller = build_controller(ELEVEN_BEHAVIOURS["blueprint-explorer"])
    scripts = [GOOD, POOR, RISING, UNPAID, MIDDLING]
    starts = [episode(replicate=index) for index in range(5)]
    together, _ = run_block(controller, [World(environment(), script) for script in scripts], starts)
    for index, (script, start) in enumerate(zip(scripts, starts)):
        np.testing.assert_array_equal(together[:, index], run_one(controller, script, start)[1])


def test_a_heuristic_without_blueprints_is_refused():
    with pytest.raises(SpecError, match="blueprints"):
        Heuristic.parse({"name": "bare", "blueprints": []})


def test_a_rotation_that_no_host_has_is_refused():
    with pytest.raises(SpecError, match="no host has all of them"):
        Heuristic.parse({"name": "mixed", "blueprints": ["conv_light", "lora"]})
    with pytest.raises(SpecError, match="did you mean 'gated_mlp'"):
        Heuristic.parse({"name": "odd", "blueprints": ["gated_mpl"]})


@pytest.mark.parametrize(
    "env",
    [environment(), environment(5), text_environment(ask_at_every_gate=True)],
    ids=["three slots", "five slots", "text"],
)
@pytest.mark.parametrize("name", sorted(ELEVEN_BEHAVIOURS))
def test_explored_episodes_keep_to_the_lifecycle(name, env):
    # run_block checks every action against its mask, the scripted world every transition against the one table
    spec = ELEVEN_BEHAVIOURS[name]
    temperature = None if name == "random" else 2.0
    starts = [episode(env, epsilon=0.5, temperature=temperature if row % 2 else None) for row in range(6)]
    if name == "random":
        starts = [episode(env, epsilon=1.0) for _ in range(6)]
    actions, decisions = run_block(build_controller(spec), [World(env, GOOD) for _ in starts], starts, key=name)
    assert {Op.WAIT, Op.GERMINATE, Op.ADVANCE, Op.PRUNE} <= set(actions[:, :, 0].ravel().tolist())
    for decision in decisions:
        assert (decision.logp_N <= 1e-12).all()
        np.testing.assert_allclose(decision.op_probs.sum(axis=1), 1.0)
