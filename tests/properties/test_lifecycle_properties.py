"""Any valid action leads from a legal state to a legal state; an invalid one changes nothing but the note of it."""

from __future__ import annotations

import numpy as np
from engine_specs import tiny_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.kasmina.lifecycle import SeedKey, SlotState, advance, fossilize, germinate, prune, tick
from esper.leyline.actions import ACTION_WIDTH, LEVER_SIZES, MAX_SLOTS, NUM_OPS, Op, canonicalise, check_mask, is_valid
from esper.leyline.stages import COOLDOWN_EPOCHS, LEGAL_TRANSITIONS, OCCUPIED_STAGES, Stage
from esper.leyline.tree import log_softmax, sample, uniform_logits
from esper.tolaria.cohort import Cohort

SEED = SeedKey(0, 3, 1, 0, "own_pass")
MOVES = {
    Op.GERMINATE: lambda slot: germinate(slot, SEED, (0, 0, 1, 1), 0.5),
    Op.ADVANCE: lambda slot: advance(slot, 0.5),
    Op.FOSSILIZE: lambda slot: fossilize(slot, 0.5),
    Op.PRUNE: prune,
}
ALLOWED_FROM = {
    Op.GERMINATE: {Stage.DORMANT},
    Op.ADVANCE: {Stage.TRAINING},
    Op.FOSSILIZE: {Stage.HOLDING},
    Op.PRUNE: {Stage.TRAINING, Stage.BLENDING, Stage.HOLDING},
}
SHORTCUTS = {(Stage.DORMANT, Stage.TRAINING)}


def legal_step(before: Stage, after: Stage) -> bool:
    """One operation or epoch: the same stage, a transition of the table, or a birth (G1 starts training at once)."""
    return before is after or after in LEGAL_TRANSITIONS[before] or (before, after) in SHORTCUTS


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*MOVES, None]), max_size=40))
def test_every_sequence_of_operations_walks_along_the_table(ops):
    slot = SlotState()
    for op in ops:
        before = slot.stage
        if op is not None and before in ALLOWED_FROM[op]:
            slot = MOVES[op](slot)
            assert legal_step(before, slot.stage)
        before = slot.stage
        slot = tick(slot, 0.5)
        assert legal_step(before, slot.stage)
        assert (slot.seed is not None) == (slot.stage in OCCUPIED_STAGES)
        assert slot.epochs_in_stage < COOLDOWN_EPOCHS.get(slot.stage, 10**9)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_cohorts_of_random_actions_stay_legal_and_invalid_ones_change_nothing(seed):
    generator = np.random.default_rng(seed)
    spec = tiny_environment(horizon=9, batches_per_epoch=1, max_seeds=int(generator.integers(1, 4)), max_fossils=1)
    num = 12
    cohort = Cohort(spec, seed % 1000, ["host"] * num)
    observation = cohort.reset()
    while not cohort.done:
        check_mask(observation.mask_KT)
        logp = log_softmax(uniform_logits(num), observation.mask_KT)
        rows = sample(logp, observation.mask_KT, generator.random((num, ACTION_WIDTH)))
        wild = generator.integers(0, (NUM_OPS, MAX_SLOTS, *LEVER_SIZES), size=rows.shape).astype(np.int8)
        rows = np.where((generator.random(num) < 0.3)[:, None], canonicalise(wild), rows)
        valid = is_valid(rows, observation.mask_KT)
        before = [(list(rider.slots), rider.lineage.host_key) for rider in cohort.riders]
        observation, applied = cohort.step(rows, observation)
        assert (applied.executed_K == valid).all()
        for rider, good, (slots, key) in zip(cohort.riders, valid, before):
            after_wait = [tick(slot, 0.5).stage for slot in slots]
            now = [slot.stage for slot in rider.slots]
            if not good:
                assert now == after_wait
                assert rider.lineage.host_key == key
            for stage, idle, reached in zip((slot.stage for slot in slots), after_wait, now):
                assert reached is idle or legal_step(stage, reached) or stage in OCCUPIED_STAGES
            assert sum(stage in OCCUPIED_STAGES for stage in now) <= spec.seeds_cap
            assert sum(stage is Stage.FOSSILIZED for stage in now) <= spec.fossils_cap
