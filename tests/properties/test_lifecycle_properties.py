"""Under every option of an environment: any valid action leads to a legal state; any other one changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from engine_specs import tiny_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.kasmina import lifecycle
from esper.kasmina.gating import gate_params
from esper.kasmina.lifecycle import NOT_STARTED, SeedKey, SlotState
from esper.leyline.actions import (
    ACTION_WIDTH,
    BLENDS,
    LEVER_SIZES,
    MAX_SLOTS,
    NUM_OPS,
    Actions,
    Blend,
    Bools,
    Op,
    canonicalise,
    check_mask,
    is_valid,
    slot_slice,
)
from esper.leyline.errors import LifecycleError
from esper.leyline.masks import LeverRules, build_mask
from esper.leyline.observations import slot_column
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import (
    BLENDED_STAGES,
    COOLDOWN_EPOCHS,
    INCUBATING_STAGES,
    LEGAL_TRANSITIONS,
    OCCUPIED_STAGES,
    Stage,
)
from esper.leyline.tree import log_softmax, sample, uniform_logits
from esper.tolaria.cohort import Cohort
from esper.tolaria.episode import Rider

NUM_SLOTS = 3
BIRTHS = {(Stage.DORMANT, Stage.TRAINING)}
"""G1 starts training within the step that germinates, where it is not asked."""

OPTIONS = {
    "ask_at_every_gate": st.booleans(),
    "gates": st.sampled_from(["permissive", "strict"]),
    "slots": st.sampled_from([None, (0,), (1,), (0, 2)]),
    "max_seeds": st.sampled_from([None, 1, 2]),
    "max_fossils": st.sampled_from([None, 0, 1]),
    "param_budget": st.sampled_from([None, 60, 200, 700]),
    "holding_patience": st.sampled_from([None, 1, 2]),
    "blends": st.sampled_from([(Blend.LINEAR, Blend.GATED), (Blend.GATED,), BLENDS]),
}


def environment(options: dict[str, object]) -> EnvironmentSpec:
    """A tiny environment with short lives and the drawn options."""
    names = tiny_environment().slot_names
    slots = options["slots"] and [names[slot] for slot in options["slots"]]
    short = {"horizon": 9, "batches_per_epoch": 1, "batch_size": 16, "tempos": (3,), "dwells": (1, 2)}
    return tiny_environment(**{**short, **options, "slots": slots})


def legal_step(before: Stage, after: Stage) -> bool:
    """One operation or epoch: the same stage, a transition of the table, or a birth."""
    return before is after or after in LEGAL_TRANSITIONS[before] or (before, after) in BIRTHS


def wild_or_valid(mask: Bools, generator: np.random.Generator, wild_share: float) -> Actions:
    """Random valid actions that seldom prune or wait, some replaced by any canonical action whatever the mask."""
    num = len(mask)
    logits = uniform_logits(num)
    logits[:, [Op.PRUNE, Op.WAIT]] -= 3.0
    rows = sample(log_softmax(logits, mask), mask, generator.random((num, ACTION_WIDTH)))
    wild = generator.integers(0, (NUM_OPS, MAX_SLOTS, *LEVER_SIZES), size=rows.shape).astype(np.int8)
    return np.where((generator.random(num) < wild_share)[:, None], canonicalise(wild), rows)


@dataclass
class Life:
    """Slots that live by `kasmina.lifecycle` and the masks alone, without a network."""

    spec: EnvironmentSpec
    step: int = 0
    slots: list[SlotState] = field(default_factory=lambda: [SlotState()] * NUM_SLOTS)
    sizes = np.array([[8, 16, 32, 64, 90, 150, 300, 600]] * MAX_SLOTS)
    gates = np.array([gate_params(4)] * MAX_SLOTS)

    def params(self) -> int:
        """Parameters of all seeds and gates."""
        return sum(
            int(self.sizes[i, s.seed.blueprint]) + int(self.gates[i]) * (s.blend_kind is Blend.GATED)
            for i, s in enumerate(self.slots)
            if s.seed is not None
        )

    def mask(self) -> Bools:
        """What the state allows."""
        spec = self.spec
        row = {"num_slots": NUM_SLOTS, "max_seeds": spec.seeds_cap, "max_fossils": spec.fossils_cap}
        row |= {"seed_params": self.params(), "param_budget": spec.param_budget or np.nan}
        for index in range(MAX_SLOTS):
            state = self.slots[index] if index < NUM_SLOTS else SlotState()
            row |= {slot_column(index, name): getattr(state, name) for name in ("stage", "epochs_in_stage")}
            row |= {slot_column(index, name): getattr(state, name) for name in ("dwell", "tempo")}
        columns = {name: np.array([float(value)]) for name, value in row.items()}
        return build_mask(columns, LeverRules.of(spec, self.sizes, self.gates))

    def after(self, row: Actions) -> SlotState:
        """The slot of an action after it; LifecycleError where the table has no such transition."""
        op, state = Op(int(row[0])), self.slots[int(row[1])]
        if op is Op.GERMINATE:
            start = NOT_STARTED if self.spec.ask_at_every_gate else self.step
            key = SeedKey(int(row[1]), int(row[2]), int(row[7]), self.step, "own_pass", start)
            return lifecycle.germinate(state, key, tuple(int(v) for v in row[3:7]), 0.5)
        if op is Op.FOSSILIZE:
            return lifecycle.fossilize(state, 0.5)
        if op is Op.PRUNE:
            return lifecycle.prune(state)
        if state.stage is Stage.GERMINATED:
            return lifecycle.start(state, self.step, 0.5)
        return lifecycle.advance(state, 0.5) if state.stage is Stage.TRAINING else lifecycle.hold(state, 0.5)

    def check(self) -> None:
        """Every invariant of a legal state."""
        asks, spec = self.spec.ask_at_every_gate, self.spec
        for index, state in enumerate(self.slots):
            assert (state.seed is not None) == (state.stage in OCCUPIED_STAGES)
            assert state.seed is None or spec.enabled_slots[index]
            assert state.epochs_in_stage < COOLDOWN_EPOCHS.get(state.stage, 10**9)
            if state.seed is not None:
                assert state.seed.has_started == (state.stage is not Stage.GERMINATED)
                assert state.seed.birth_epoch <= max(state.seed.start_epoch, state.seed.birth_epoch) <= self.step
                assert asks or state.seed.start_epoch == state.seed.birth_epoch
            assert asks or state.stage is not Stage.GERMINATED
            assert asks or state.stage is not Stage.BLENDING or state.epochs_in_stage < state.tempo_epochs
        assert sum(state.stage in OCCUPIED_STAGES for state in self.slots) <= spec.seeds_cap
        assert sum(state.stage is Stage.FOSSILIZED for state in self.slots) <= spec.fossils_cap
        assert spec.param_budget is None or self.params() <= spec.param_budget


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(OPTIONS), st.integers(0, 2**31))
def test_from_every_legal_state_what_the_mask_allows_the_lifecycle_does_and_the_result_is_legal(options, seed):
    life = Life(environment(options))
    generator = np.random.default_rng(seed)
    for _ in range(24):
        mask = life.mask()
        check_mask(mask)
        row = wild_or_valid(mask, generator, 0.2)
        before = list(life.slots)
        index = int(row[0, 1])
        if row[0, 0] != Op.WAIT and is_valid(row, mask)[0]:
            life.slots[index] = life.after(row[0])
            assert legal_step(before[index].stage, life.slots[index].stage)
            assert life.slots[index].stage is not before[index].stage
        life.check()
        ticked = [lifecycle.tick(slot, 0.5, ask_at_every_gate=life.spec.ask_at_every_gate) for slot in life.slots]
        assert all(legal_step(slot.stage, after.stage) for slot, after in zip(life.slots, ticked))
        life.step, life.slots = life.step + 1, ticked
        life.check()


TAKES = {
    Op.GERMINATE: {Stage.DORMANT},
    Op.ADVANCE: {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING},
    Op.FOSSILIZE: {Stage.HOLDING},
    Op.PRUNE: {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING},
}


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("op", list(TAKES))
def test_the_lifecycle_raises_on_every_operation_that_a_stage_does_not_have_and_the_mask_has_none_of_them(
    op, stage, asks
):
    life = Life(tiny_environment(ask_at_every_gate=asks))
    seed = SeedKey(0, 3, 1, 0, "own_pass", 0) if stage in OCCUPIED_STAGES else None
    held = SlotState(stage=stage, epochs_in_stage=30, seed=seed, blend=0, tempo=0, dwell=0, isolation=0)
    life.slots[0] = held
    row = np.array([op, 0, 0, 0, 0, 0, 0, 0], dtype=np.int8)
    allowed = bool(life.mask()[0, slot_slice(op)][0])
    if stage in TAKES[op]:
        assert legal_step(stage, life.after(row).stage)
        assert allowed == (asks or op is not Op.ADVANCE or stage is Stage.TRAINING)
    else:
        assert not allowed
        with pytest.raises(LifecycleError):
            life.after(row)
    assert life.slots[0] is held


def weights(cohort: Cohort) -> dict[str, list[torch.Tensor]]:
    """Every tensor of every lineage: host, blended seeds, incubating seeds."""
    out = {}
    for key, lineage in cohort._flock.lineages.items():
        modules = [lineage.network.host, *(graft.module for graft in lineage.network.grafts.values())]
        modules += [incubation.module for incubation in lineage.incubations.values()]
        out[key] = [tensor for module in modules for tensor in module.state_dict().values()]
    return out


def check_cohort(cohort: Cohort, spec: EnvironmentSpec) -> None:
    """Riders, lineages and incubations fit together."""
    for rider in cohort.riders:
        lineage = cohort._flock.lineages[rider.lineage.host_key]
        assert lineage is rider.lineage
        blended = {i for i, slot in enumerate(rider.slots) if slot.stage in BLENDED_STAGES}
        assert blended == set(lineage.seeds) == set(lineage.network.grafts)
        assert all(lineage.seeds[i].key == rider.slots[i].seed for i in blended)
        assert set(rider.incubating()) <= set(lineage.incubations)
        assert len(rider.incubating()) == sum(slot.stage in INCUBATING_STAGES for slot in rider.slots)
        assert spec.param_budget is None or rider.seed_params() <= spec.param_budget
        assert sum(slot.stage in OCCUPIED_STAGES for slot in rider.slots) <= spec.seeds_cap
        assert rider.num_fossils() <= spec.fossils_cap
        assert all(spec.enabled_slots[i] for i, slot in enumerate(rider.slots) if slot.seed is not None)


@pytest.mark.parametrize("asks", [False, True])
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(OPTIONS), st.integers(0, 2**31))
def test_a_cohort_in_which_every_refused_action_was_a_wait_is_the_same_cohort_byte_for_byte(asks, options, seed):
    spec, num = environment({**options, "ask_at_every_gate": asks}), 8
    generator = np.random.default_rng(seed)
    cohort, twin = (Cohort(spec, seed % 1000, ["host"] * num) for _ in range(2))
    observation, other = cohort.reset(), twin.reset()
    while not cohort.done:
        check_mask(observation.mask_KT)
        rows = wild_or_valid(observation.mask_KT, generator, 0.3)
        valid = is_valid(rows, observation.mask_KT)
        before = [[slot.stage for slot in rider.slots] for rider in cohort.riders]
        observation, applied = cohort.step(rows, observation)
        assert not (applied.executed_K & ~valid).any()
        for index in np.flatnonzero(valid & ~applied.executed_K):
            assert applied.refused_by[index].split(":")[0] in ("G2", "G5")
        carried_out = np.array([rider.executed_rows[-1] for rider in cohort.riders], dtype=np.int8)
        other, _ = twin.step(carried_out, other)
        for ours, theirs, stages in zip(cohort.riders, twin.riders, before):
            assert ours.slots == theirs.slots
            assert ours.lineage.host_key == theirs.lineage.host_key
            ours_id, theirs_id = (as_if_unasked(rider).state_id(observation.step) for rider in (ours, theirs))
            assert ours_id == theirs_id
            for stage, slot in zip(stages, ours.slots):
                reached = {stage} | {b for a in Stage if legal_step(stage, a) for b in Stage if legal_step(a, b)}
                assert slot.stage in reached
        check_cohort(cohort, spec)
        mine, others = weights(cohort), weights(twin)
        assert mine.keys() == others.keys()
        assert all(torch.equal(a, b) for key in mine for a, b in zip(mine[key], others[key], strict=True))


def as_if_unasked(rider: Rider) -> Rider:
    """The rider without the note of its last action, which is all that a refused one may change."""
    return replace(rider, last_op=-1, last_executed=False)
