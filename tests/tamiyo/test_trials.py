"""Trials: several seeds incubate at once, one is kept."""

import numpy as np
import pytest
from scripted import Script, World, environment, episode, observe, run_block, run_one, text_environment

from esper.leyline.actions import Op
from esper.leyline.blueprint_names import blueprint_code
from esper.leyline.controller_specs import TrialKeep
from esper.leyline.errors import SpecError
from esper.leyline.stages import Stage
from esper.tamiyo.registry import build_controller

HEAVY = blueprint_code("conv_heavy", "cnn")


def trial(**changes):
    return TrialKeep(**{"name": "trial", "slots": (0, 1, 2), **changes})


def test_three_seeds_incubate_five_epochs_then_one_is_blended_and_the_others_pruned():
    events, rows = run_one(build_controller(trial(keep=1)))
    assert events == [
        (0, "GERMINATE", 0),
        (1, "GERMINATE", 1),
        (2, "GERMINATE", 2),
        (7, "ADVANCE", 1),
        (8, "PRUNE", 0),
        (9, "PRUNE", 2),
        (10, "FOSSILIZE", 1),
    ]
    assert set(rows[:3, 2].tolist()) == {HEAVY}


@pytest.mark.parametrize("keep", [0, 2])
def test_every_kept_slot_has_the_same_life_before_the_choice(keep):
    first, rows = run_one(build_controller(trial(keep=keep)))
    _, others = run_one(build_controller(trial(keep=1)))
    np.testing.assert_array_equal(rows[:7], others[:7])
    assert (7, "ADVANCE", keep) in first


def kept_by(drops):
    """The slot that the largest probe chooses, given the probes of slots 0, 1, 2."""
    controller = build_controller(trial())
    world, carry = World(environment()), controller.start([episode()])
    for _ in range(8):
        inputs = observe([world])
        for slot, drop in enumerate(drops):
            inputs.columns[f"s{slot}_val_loss_drop"][:] = drop
        decision = controller.act(inputs, carry)
        carry = decision.carry
        world.apply(decision.actions_NA[0])
    assert decision.actions_NA[0, 0] == Op.ADVANCE
    return int(decision.actions_NA[0, 1])


@pytest.mark.parametrize(
    ("drops", "slot"),
    [((0.1, 0.3, 0.2), 1), ((-0.1, -0.3, -0.2), 0), ((np.nan, -0.3, -0.2), 2), ((np.nan,) * 3, 0)],
)
def test_the_largest_probe_is_kept_and_an_unmeasured_one_counts_least(drops, slot):
    assert kept_by(drops) == slot


def test_a_trial_shorter_than_its_births_still_waits_for_all_of_them():
    events, _ = run_one(build_controller(trial(keep=0, incubation_epochs=1)))
    assert events[:4] == [(0, "GERMINATE", 0), (1, "GERMINATE", 1), (2, "GERMINATE", 2), (3, "ADVANCE", 0)]


def test_a_trial_of_one_seed_plants_and_keeps_it():
    events, _ = run_one(build_controller(trial(slots=(1,), incubation_epochs=1)))
    assert events == [(0, "GERMINATE", 1), (1, "ADVANCE", 1), (4, "FOSSILIZE", 1)]


def test_a_refused_seed_does_not_keep_the_others_alive():
    events, _ = run_one(build_controller(trial(keep=0)), Script(refuses=lambda op: op is Op.ADVANCE))
    assert [event for event in events if event[1] == "PRUNE"] == [(8, "PRUNE", 1), (10, "PRUNE", 2)]


def test_with_epsilon_every_action_is_valid_its_probability_exact_and_one_seed_at_most_is_kept():
    controller = build_controller(trial(keep=2))
    starts = [episode(epsilon=0.3, repetition=i) for i in range(64)]
    worlds = [World(start.environment) for start in starts]
    actions, decisions = run_block(controller, worlds, starts)
    assert (np.concatenate([d.logp_N for d in decisions]) > -np.inf).all()
    certain = np.exp(decisions[0].logp_N[(actions[0] == [int(Op.GERMINATE), 0, HEAVY, 0, 0, 0, 0, 1]).all(axis=1)])
    assert len(certain) > 32
    assert (certain > 0.7).all()
    kept = [sum(stage is Stage.FOSSILIZED for stage in world.stage) for world in worlds]
    assert np.mean([num >= 1 for num in kept]) > 0.7


def test_a_transformer_gets_the_counterpart():
    start = episode(text_environment())
    _, rows = run_one(build_controller(trial()), start=start)
    assert rows[0, 2] == blueprint_code("mlp", "transformer")


def test_a_trial_that_an_environment_has_no_room_for_is_refused():
    with pytest.raises(SpecError, match="max_seeds, 2"):
        build_controller(trial()).start([episode(environment(max_seeds=2))])
    with pytest.raises(SpecError, match="slot 2"):
        build_controller(trial()).start([episode(environment(2, max_seeds=3))])


@pytest.mark.parametrize("changes", [{"keep": 3}, {"slots": (0, 0)}, {"slots": ()}, {"blueprint": "nothing"}])
def test_a_trial_that_makes_no_sense_is_refused(changes):
    with pytest.raises(SpecError):
        TrialKeep.parse({"name": "trial", "slots": [0, 1], **changes})
