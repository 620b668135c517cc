"""The life of a seed under the environment's options: every gate asked, strict gates, cool-down, patience, slots."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_specs import tiny_environment

from esper.kasmina.gating import gate_params
from esper.leyline.actions import WAIT_ROW, Action, Blend, Op, lever_slice, slot_slice
from esper.leyline.gate_thresholds import G2_MIN_GRADIENT_RATIO, G2_MIN_IMPROVEMENT_POINTS, G5_MIN_REMOVAL_COST_POINTS
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.stages import Stage
from esper.tolaria import lineage as lineages
from esper.tolaria.cohort import Cohort

LIGHT, HEAVY = 6, 7


def germinate(slot: int = 0, blueprint: int = LIGHT, **levers: object) -> np.ndarray:
    return Action(op=Op.GERMINATE, slot=slot, blueprint=blueprint, **levers).to_row()


def act(op: Op, slot: int = 0) -> np.ndarray:
    return Action(op=op, slot=slot).to_row()


ADVANCE, FOSSILIZE, PRUNE = (act(op) for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE))


class Drive:
    """A cohort that is given one script of actions per episode; keeps the stages of slot 0 and what was refused."""

    def __init__(self, *scripts: list[np.ndarray], **changes: object) -> None:
        small = {"batches_per_epoch": 1, "horizon": 12}
        self.cohort = Cohort(tiny_environment(**{**small, **changes}), 11, ["host"] * len(scripts))
        self.observation = self.cohort.reset()
        self.stages: list[list[Stage]] = [[] for _ in scripts]
        self.refused: list[list[str | None]] = [[] for _ in scripts]
        for step in range(max(map(len, scripts))):
            self.step(*(script[step] if step < len(script) else WAIT_ROW for script in scripts))

    def step(self, *rows: np.ndarray) -> None:
        self.observation, applied = self.cohort.step(np.stack(rows), self.observation)
        for rider, stages, refused in zip(self.cohort.riders, self.stages, self.refused):
            stages.append(rider.slots[0].stage)
            refused.append(applied.refused_by[rider.index])

    def germinable(self, rider: int = 0) -> list[int]:
        return np.flatnonzero(self.observation.mask_KT[rider, slot_slice(Op.GERMINATE)]).tolist()


def state(network: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_asked_at_every_gate_a_life_takes_three_advances_and_the_host_goes_the_same_way(monkeypatch):
    real = lineages.new_seed
    monkeypatch.setattr(lineages, "new_seed", lambda spec, key, *rest: real(spec, replace(key, birth_epoch=0), *rest))
    asked = [germinate(), ADVANCE, ADVANCE, WAIT_ROW, WAIT_ROW, ADVANCE, FOSSILIZE, WAIT_ROW]
    plain = [WAIT_ROW, germinate(), ADVANCE, WAIT_ROW, WAIT_ROW, WAIT_ROW, FOSSILIZE, WAIT_ROW]
    ours = Drive(asked, ask_at_every_gate=True, batches_per_epoch=3)
    theirs = Drive(plain, batches_per_epoch=3)
    names = ["GERMINATED", "TRAINING", "BLENDING", "BLENDING", "BLENDING", "HOLDING", "FOSSILIZED", "FOSSILIZED"]
    assert [stage.name for stage in ours.stages[0]] == names
    assert ours.refused[0] == [None] * 8
    assert theirs.stages[0][4] is Stage.HOLDING
    mine, other = ours.cohort.riders[0].lineage, theirs.cohort.riders[0].lineage
    assert [m.val_loss for m in mine.history] == [m.val_loss for m in other.history]
    assert equal(state(mine.network.host), state(other.network.host))
    assert equal(state(mine.network.grafts[0].module), state(other.network.grafts[0].module))


def test_only_the_advance_through_g2_moves_an_episode_to_another_lineage():
    life = [germinate(), ADVANCE, ADVANCE, WAIT_ROW, WAIT_ROW, ADVANCE]
    cohort = Cohort(tiny_environment(ask_at_every_gate=True, horizon=8), 11, ["host"])
    observation, keys = cohort.reset(), []
    for row in life:
        observation, _ = cohort.step(row[None], observation)
        keys.append(cohort.riders[0].lineage.host_key)
    assert keys[0] == keys[1] == cohort.trunk.host_key
    assert keys[2] == keys[5] != keys[1]


def test_a_waiting_seed_does_not_train_and_starts_from_the_weights_of_its_birth():
    drive = Drive([germinate()] * 2, [germinate()], ask_at_every_gate=True)
    (waiting,) = drive.cohort.trunk.incubations.values()
    assert not waiting.key.has_started
    born = state(waiting.module)
    assert equal(born, state(lineages.new_seed(drive.cohort.spec, waiting.key, 11, 4)))
    assert math.isnan(waiting.measures.val_loss_drop)
    assert math.isnan(waiting.measures.gradient_norm)
    trunk = drive.cohort.trunk
    firsts = []
    incubate = trunk.incubate
    trunk.incubate = lambda *args: firsts.append(state(incubate(*args).module))
    drive.step(ADVANCE, WAIT_ROW)
    drive.step(WAIT_ROW, ADVANCE)
    del trunk.incubate
    assert [seed.start_epoch for seed in trunk.incubations] == [2, 3]
    assert all(equal(born, first) for first in firsts)
    assert len(firsts) == 2
    assert not any(equal(born, state(i.module)) for i in trunk.incubations.values())
    bare = Drive([WAIT_ROW] * 4)
    assert equal(state(trunk.network.host), state(bare.cohort.trunk.network.host))


def test_a_waiting_seed_can_be_pruned_and_a_full_blend_waits_at_alpha_one():
    early = [germinate(), WAIT_ROW, PRUNE]
    full = [germinate(), ADVANCE, ADVANCE, *[WAIT_ROW] * 5]
    drive = Drive(early, full, ask_at_every_gate=True)
    assert drive.stages[0][:4] == [Stage.GERMINATED, Stage.GERMINATED, Stage.EMBARGOED, Stage.EMBARGOED]
    assert drive.stages[1][2:] == [Stage.BLENDING] * 6
    assert drive.cohort.riders[1].lineage.network.grafts[0].alpha == 1.0
    assert not drive.cohort.trunk.incubations
    drive.step(WAIT_ROW, ADVANCE)
    assert drive.stages[1][-1] is Stage.HOLDING


def test_a_pruned_slot_is_pruned_embargoed_and_resetting_for_one_five_and_one_epochs():
    drive = Drive([germinate(), PRUNE])
    free_after = 0
    while 0 not in drive.germinable():
        drive.step(germinate())
        free_after += 1
        if free_after < 7:
            assert drive.refused[0][-1] == "mask:invalid_action"
    assert free_after + 1 == 7
    assert drive.stages[0][1:] == [Stage.EMBARGOED] * 5 + [Stage.RESETTING] + [Stage.DORMANT]
    assert drive.germinable() == [0, 1, 2]


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("asks", [False, True])
def test_patience_is_the_number_of_decisions_for_which_a_seed_is_held(patience, asks):
    life = [germinate(), *[ADVANCE] * (1 + asks), WAIT_ROW, WAIT_ROW, *[WAIT_ROW, WAIT_ROW, ADVANCE] * asks]
    drive = Drive(life, ask_at_every_gate=asks, holding_patience=patience, horizon=14)
    assert drive.stages[0][-1] is Stage.HOLDING
    key, lost = drive.cohort.riders[0].lineage.host_key, []
    for _ in range(patience):
        lost.append(drive.stages[0][-1] is not Stage.HOLDING)
        drive.step(WAIT_ROW)
    assert not any(lost)
    assert drive.stages[0][-1] is Stage.PRUNED
    assert drive.cohort.riders[0].lineage.host_key != key
    assert drive.cohort.riders[0].lineage.network.grafts == {}


def test_what_an_expired_seed_was_measured_together_with_is_unmeasured_until_the_next_epoch():
    life = [germinate(0), germinate(1), act(Op.ADVANCE, 0), act(Op.ADVANCE, 1), WAIT_ROW, WAIT_ROW]
    drive = Drive(life[:5], holding_patience=1, probe_pairs=True, horizon=14)

    def seen(name: str) -> bool:
        return not math.isnan(drive.observation.matrix[0, FEATURE_COLUMNS.index(name)])

    measured = []
    for _ in range(3):
        measured.append((seen("removal_cost_all"), seen("s1_interaction_sum"), seen("s1_removal_cost")))
        drive.step(WAIT_ROW)
    assert measured == [(True, True, True), (False, False, True), (False, False, False)]


def test_seeds_germinate_in_the_named_slots_alone():
    names = tiny_environment().slot_names
    drive = Drive([germinate(0)], [germinate(2)], slots=(names[2],))
    assert drive.refused == [["mask:invalid_action"], [None]]
    assert drive.germinable(0) == [2]
    assert drive.germinable(1) == []


def test_a_strict_g2_refuses_by_name_spends_the_step_and_opens_on_the_measures_alone():
    drive = Drive([germinate(), WAIT_ROW], gates="strict")
    (incubation,) = drive.cohort.trunk.incubations.values()
    measures = incubation.measures
    measures.seed_improvement, measures.gradient_vanishing, measures.gradient_ratio = math.nan, 0.0, 0.0
    slots = list(drive.cohort.riders[0].slots)
    drive.step(ADVANCE)
    assert drive.refused[0][-1] == "G2:seed_improvement,gradient_alive"
    assert drive.cohort.riders[0].slots[0] == replace(slots[0], epochs_in_stage=slots[0].epochs_in_stage + 1)
    assert not drive.cohort.riders[0].last_executed
    measures.seed_improvement, measures.gradient_ratio = G2_MIN_IMPROVEMENT_POINTS, G2_MIN_GRADIENT_RATIO
    measures.gradient_vanishing = 0.5
    drive.step(ADVANCE)
    assert drive.refused[0][-1] is None
    assert drive.stages[0][-1] is Stage.BLENDING


def test_a_strict_g5_asks_what_the_seed_is_worth():
    drive = Drive([germinate(), ADVANCE, WAIT_ROW, WAIT_ROW])
    drive.cohort._flock.spec = drive.cohort.spec.model_copy(update={"gates": "strict"})
    seed = drive.cohort.riders[0].lineage.seeds[0]
    for cost, refused in ((math.nan, "G5:removal_cost"), (0.99, "G5:removal_cost"), (G5_MIN_REMOVAL_COST_POINTS, None)):
        seed.measures.removal_cost = cost
        drive.step(FOSSILIZE)
        assert drive.refused[0][-1] == refused
        seed = drive.cohort.riders[0].lineage.seeds[0]
    assert drive.stages[0][-1] is Stage.FOSSILIZED


def test_a_gated_blend_counts_its_gate_from_germination_on():
    drive = Drive([germinate(blend=Blend.GATED)], [germinate()])
    gate = gate_params(4)
    rider, plain = drive.cohort.riders
    assert rider.seed_params() == plain.seed_params() + gate
    before = rider.seed_params()
    drive.step(ADVANCE, WAIT_ROW)
    assert rider.seed_params() == before == rider.lineage.seeds[0].num_params


@pytest.mark.parametrize("fits", [True, False])
def test_the_budget_counts_seeds_with_their_gates_and_is_never_exceeded(fits):
    heavy = Drive([germinate(0, HEAVY)]).cohort.riders[0].seed_params()
    budget = heavy + gate_params(4) - (not fits)
    drive = Drive([germinate(0, HEAVY, blend=Blend.GATED)], [germinate(0, HEAVY)], param_budget=budget)
    assert drive.refused == [[None if fits else "mask:invalid_action"], [None]]
    assert drive.cohort.riders[0].seed_params() == (budget if fits else 0)
    assert drive.germinable(0) == ([] if fits else [0, 1, 2])
    assert drive.germinable(1) == [1, 2]


@pytest.mark.parametrize("root", ["wider:0.5", "host", "wider:1.25"])
def test_gate_and_mask_agree_on_the_budget_of_a_root_of_another_width(root):
    cohort = Cohort(tiny_environment(param_budget=100, horizon=1), 11, [root] * 8)
    observation = cohort.reset()
    allowed = observation.mask_KT[0, lever_slice(2, 0)]
    _, applied = cohort.step(np.stack([germinate(2, blueprint) for blueprint in range(8)]), observation)
    assert applied.executed_K.tolist() == allowed.tolist()
    assert set(applied.refused_by) <= {None, "mask:invalid_action"}
    assert allowed.any() == (root != "wider:1.25")


def test_an_invalid_action_leaves_every_byte_of_the_cohort_as_waiting_does():
    script = [germinate(), ADVANCE, germinate(1)]
    drive, twin = Drive(script), Drive(script)
    wrong = germinate(0)
    drive.step(wrong)
    twin.step(WAIT_ROW)
    ours, theirs = drive.cohort.riders[0], twin.cohort.riders[0]
    assert drive.refused[0][-1] == "mask:invalid_action"
    assert ours.slots == theirs.slots
    assert ours.lineage.host_key == theirs.lineage.host_key
    assert equal(state(ours.lineage.network.host), state(theirs.lineage.network.host))
    assert ours.submitted_rows[-1] == tuple(wrong)
    assert ours.executed_rows[-1] == tuple(WAIT_ROW)


def test_an_episode_that_ended_on_the_trunk_keeps_the_seeds_that_it_is_observed_with():
    drive = Drive([germinate()], [germinate(), ADVANCE])
    ended, running = drive.cohort.riders
    ended.done = True
    params = ended.seed_params()
    drive.step(WAIT_ROW, WAIT_ROW)
    assert ended.seed_params() == params > 0
    assert running.lineage.host_key in drive.cohort._flock.lineages
    running.done = True
    drive.step(WAIT_ROW, WAIT_ROW)
    assert set(drive.cohort._flock.lineages) == {drive.cohort.trunk.host_key}
