"""The one table of transitions, and what each state allows."""

import itertools

import numpy as np
import pytest

from esper.leyline.actions import LEVERS, MAX_SLOTS, TEMPO_EPOCHS, Op, check_mask, lever_slice, slot_slice
from esper.leyline.errors import LifecycleError
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.observations import slot_column
from esper.leyline.specs import CnnHost, DigitsTask, EnvironmentSpec
from esper.leyline.stages import (
    BLENDED_STAGES,
    COOLDOWN_EPOCHS,
    INCUBATING_STAGES,
    LEGAL_TRANSITIONS,
    LIVE_STAGES,
    OCCUPIED_STAGES,
    STAGE_ORDER,
    Stage,
    check_transition,
)

LEVER_MASKS = tuple(np.ones(size, dtype=bool) for size in (8, 5, 4, 4, 2, 3))


ALL_SLOTS = np.ones(MAX_SLOTS, dtype=bool)
NO_GATES = np.zeros(MAX_SLOTS, dtype=np.int64)


def columns(stages, *, epochs=0, dwell=0, tempo=0, **fields):
    """One row with the given stages in its first slots."""
    out = {"num_slots": len(stages), "max_seeds": len(stages), "max_fossils": len(stages)}
    out |= {"param_budget": np.nan, "seed_params": 0, **fields}
    for slot in range(MAX_SLOTS):
        there = slot < len(stages)
        out[slot_column(slot, "stage")] = stages[slot] if there else np.nan
        out[slot_column(slot, "epochs_in_stage")] = epochs if there else np.nan
        out[slot_column(slot, "dwell")] = dwell if there else np.nan
        out[slot_column(slot, "tempo")] = tempo if there else np.nan
    return {name: np.array([value], dtype=np.float32) for name, value in out.items()}


def mask_of(stages, *, lever_masks=LEVER_MASKS, params=None, enabled=ALL_SLOTS, asks=False, gates=NO_GATES, **fields):
    sizes = np.full((MAX_SLOTS, 8), 10, dtype=np.int64) if params is None else params
    mask = build_mask(columns(stages, **fields), LeverRules(sizes, lever_masks, enabled, asks, gates))
    check_mask(mask)
    return mask[0]


def slots(mask, op):
    return np.flatnonzero(mask[slot_slice(op)]).tolist()


def test_every_stage_has_its_transitions_and_only_fossils_are_terminal():
    assert set(LEGAL_TRANSITIONS) == set(Stage) == set(STAGE_ORDER)
    assert [stage for stage, after in LEGAL_TRANSITIONS.items() if not after] == [Stage.FOSSILIZED]


def test_a_life_may_go_from_dormant_to_fossil_and_a_pruned_slot_becomes_free_again():
    for path in (
        (Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED),
        (Stage.HOLDING, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT),
    ):
        for before, after in itertools.pairwise(path):
            assert check_transition(before, after) is after


def test_every_other_transition_is_an_error_that_names_both_stages():
    for before in Stage:
        for after in set(Stage) - LEGAL_TRANSITIONS[before]:
            with pytest.raises(LifecycleError, match=f"{before.name} -> {after.name}"):
                check_transition(before, after)


def test_only_live_seeds_can_be_pruned_and_stage_sets_fit_together():
    prunable = {stage for stage, after in LEGAL_TRANSITIONS.items() if Stage.PRUNED in after}
    assert prunable == LIVE_STAGES
    assert INCUBATING_STAGES < LIVE_STAGES < OCCUPIED_STAGES
    assert OCCUPIED_STAGES - INCUBATING_STAGES == BLENDED_STAGES


def test_a_pruned_slot_cools_down_for_seven_epochs():
    assert sum(COOLDOWN_EPOCHS.values()) == 7
    assert COOLDOWN_EPOCHS[Stage.EMBARGOED] == 5


def test_stage_codes_are_the_published_ones():
    assert [int(stage) for stage in Stage] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_free_slots_can_germinate_and_absent_ones_cannot():
    mask = mask_of([Stage.DORMANT, Stage.DORMANT])
    assert slots(mask, Op.GERMINATE) == [0, 1]
    assert not mask[lever_slice(2, 0)].any()
    assert mask[:5].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("stage", sorted(set(Stage) - {Stage.DORMANT}))
def test_no_slot_but_a_dormant_one_germinates(stage):
    assert slots(mask_of([stage]), Op.GERMINATE) == []


@pytest.mark.parametrize(("dwell", "needed"), [(0, 1), (1, 2), (2, 3), (3, 5)])
def test_advance_waits_for_the_dwell_chosen_at_germination(dwell, needed):
    assert slots(mask_of([Stage.TRAINING], epochs=needed - 1, dwell=dwell), Op.ADVANCE) == []
    assert slots(mask_of([Stage.TRAINING], epochs=needed, dwell=dwell), Op.ADVANCE) == [0]


@pytest.mark.parametrize("stage", list(Stage))
def test_prune_takes_live_seeds_and_fossilize_held_ones(stage):
    mask = mask_of([stage], epochs=9)
    assert slots(mask, Op.PRUNE) == ([0] if stage in LIVE_STAGES else [])
    assert slots(mask, Op.FOSSILIZE) == ([0] if stage is Stage.HOLDING else [])


def test_max_seeds_counts_live_and_fossil_seeds():
    stages = [Stage.FOSSILIZED, Stage.TRAINING, Stage.DORMANT]
    assert slots(mask_of(stages, max_seeds=3), Op.GERMINATE) == [2]
    assert slots(mask_of(stages, max_seeds=2), Op.GERMINATE) == []


def test_max_fossils_masks_fossilize_alone():
    stages = [Stage.FOSSILIZED, Stage.HOLDING, Stage.DORMANT]
    mask = mask_of(stages, max_fossils=1)
    assert slots(mask, Op.FOSSILIZE) == []
    assert slots(mask, Op.PRUNE) == [1]
    assert slots(mask, Op.GERMINATE) == [2]


def test_the_budget_masks_blueprints_that_do_not_fit_and_the_slot_where_none_does():
    params = np.tile(np.arange(10, 90, 10), (MAX_SLOTS, 1))
    params[1] = 1000
    mask = mask_of([Stage.DORMANT, Stage.DORMANT], params=params, param_budget=100, seed_params=60)
    assert slots(mask, Op.GERMINATE) == [0]
    assert mask[lever_slice(0, 0)].tolist() == [True] * 4 + [False] * 4
    assert not mask_of([Stage.DORMANT], params=params, param_budget=5)[Op.GERMINATE]


def test_without_a_budget_every_blueprint_fits():
    assert mask_of([Stage.DORMANT], seed_params=10**6)[lever_slice(0, 0)].all()


def test_levers_follow_what_the_environment_offers():
    offered = tuple(np.arange(size) == size - 1 for size in (8, 5, 4, 4, 2, 3))
    mask = mask_of([Stage.DORMANT], lever_masks=offered)
    for lever in range(len(LEVERS)):
        np.testing.assert_array_equal(mask[lever_slice(0, lever)], offered[lever])


def test_wait_is_always_valid():
    assert mask_of([Stage.FOSSILIZED])[:5].tolist() == [True, False, False, False, False]


def test_a_seed_may_germinate_in_the_slots_in_use_alone():
    enabled = np.arange(MAX_SLOTS) == 1
    mask = mask_of([Stage.DORMANT] * 3, enabled=enabled)
    assert slots(mask, Op.GERMINATE) == [1]
    assert not mask[lever_slice(0, 0)].any()
    assert slots(mask_of([Stage.TRAINING] * 3, enabled=enabled, epochs=3), Op.ADVANCE) == [0, 1, 2]


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("epochs", [0, 4, 5])
def test_where_every_gate_is_asked_waiting_and_full_seeds_advance_too(stage, epochs):
    expected = {Stage.GERMINATED: True, Stage.TRAINING: epochs >= 1, Stage.BLENDING: epochs >= TEMPO_EPOCHS[1]}
    assert slots(mask_of([stage], epochs=epochs, tempo=1, asks=True), Op.ADVANCE) == [0] * expected.get(stage, False)
    by_themselves = stage is Stage.TRAINING and epochs >= 1
    assert slots(mask_of([stage], epochs=epochs, tempo=1), Op.ADVANCE) == [0] * by_themselves


def test_a_gated_blend_is_offered_where_every_blueprint_on_offer_fits_with_its_gate():
    params = np.tile(np.arange(10, 90, 10), (MAX_SLOTS, 1))
    gates = np.full(MAX_SLOTS, 7)
    for budget, blueprints, gated in ((17, 1, True), (16, 1, False), (25, 2, False), (27, 2, True), (87, 8, True)):
        mask = mask_of([Stage.DORMANT], params=params, gates=gates, param_budget=budget)
        assert mask[lever_slice(0, 0)].sum() == blueprints
        assert mask[lever_slice(0, 1)].tolist() == [True] * 4 + [gated]
    assert mask_of([Stage.DORMANT], params=params, gates=gates)[lever_slice(0, 1)].all()


def test_where_every_blend_is_gated_a_blueprint_counts_with_its_gate():
    params = np.tile(np.arange(10, 90, 10), (MAX_SLOTS, 1))
    gated_only = (LEVER_MASKS[0], np.arange(5) == 4, *LEVER_MASKS[2:])
    for budget, blueprints in ((16, 0), (17, 1), (26, 1), (27, 2)):
        mask = mask_of(
            [Stage.DORMANT], params=params, gates=np.full(MAX_SLOTS, 7), param_budget=budget, lever_masks=gated_only
        )
        assert mask[lever_slice(0, 0)].sum() == blueprints
        assert mask[lever_slice(0, 1)].tolist() == [False] * 4 + [blueprints > 0]


def test_the_rules_of_an_environment_are_its_slots_levers_and_gates():
    host = CnnHost(channels=(4, 4), kernels=(3, 3), pools=(2, 1))
    spec = EnvironmentSpec(
        name="two", task=DigitsTask(), host=host, learning_rate=0.1, batch_size=8, batches_per_epoch=1, horizon=2
    )
    sizes = np.ones((MAX_SLOTS, 8), dtype=np.int64)
    plain = LeverRules.of(spec, sizes)
    assert plain.enabled_slots.tolist() == [True, True] + [False] * 4
    assert not plain.ask_at_every_gate
    chosen = spec.model_copy(update={"slots": (spec.slot_names[1],), "ask_at_every_gate": True, "tempos": (8,)})
    rules = LeverRules.of(chosen, sizes, np.arange(MAX_SLOTS))
    assert rules.enabled_slots.tolist() == [False, True] + [False] * 4
    assert rules.ask_at_every_gate
    assert rules.lever_masks[2].tolist() == [False, False, True, False]
    assert rules.gate_params_S.tolist() == [0, 1, 2, 3, 4, 5]
