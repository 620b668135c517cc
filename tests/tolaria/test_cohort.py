from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from engine_specs import tiny_environment

from esper.leyline.actions import WAIT_ROW, Action, Isolation, Op
from esper.leyline.errors import LifecycleError, SpecError
from esper.leyline.stages import Stage
from esper.tolaria.cohort import Cohort
from esper.tolaria.lineage import Lineage

HEAVY, LIGHT, NORM = 7, 6, 0


def germinate(slot: int = 0, blueprint: int = LIGHT, **levers: object) -> np.ndarray:
    return Action(op=Op.GERMINATE, slot=slot, blueprint=blueprint, **levers).to_row()


def act(op: Op, slot: int = 0) -> np.ndarray:
    return Action(op=op, slot=slot).to_row()


def drive(cohort: Cohort, scripts: list[list[np.ndarray]], until: int | None = None):
    """Run scripted actions (WAIT once a script is over); yields the cohort after every epoch."""
    observation = cohort.reset()
    for step in range(cohort.spec.horizon if until is None else until):
        rows = [script[step] if step < len(script) else WAIT_ROW for script in scripts]
        observation, applied = cohort.step(np.stack(rows), observation)
        yield observation, applied


def run(scripts, until=None, **changes) -> Cohort:
    cohort = Cohort(tiny_environment(**changes), 11, ["host"] * len(scripts))
    for _ in drive(cohort, scripts, until):
        pass
    return cohort


def weights(lineage: Lineage) -> list[torch.Tensor]:
    return list(lineage.network.host.state_dict().values())


@pytest.mark.parametrize("blueprint", range(8))
def test_with_a_seed_incubating_the_host_equals_the_trunk_byte_for_byte_after_five_epochs(blueprint):
    scripts = [[germinate(slot, blueprint)] for slot in range(3)]
    cohort = run(scripts, until=5)
    alone = run([[]], until=5)
    for ours, bare in zip(weights(cohort.trunk), weights(alone.trunk)):
        assert torch.equal(ours, bare)
    trained = list(cohort.trunk.incubations.values())
    assert len(trained) == 3
    assert all(any(float(p.detach().abs().max()) > 0 for p in i.module.parameters()) for i in trained)


def test_episodes_share_a_lineage_until_an_action_changes_the_host():
    cohort = Cohort(tiny_environment(), 11, ["host"] * 3)
    scripts = [[], [germinate()], [germinate(), act(Op.ADVANCE)]]
    keys = [[r.lineage.host_key for r in cohort.riders] for _ in drive(cohort, scripts, 2)]
    assert len(set(keys[0])) == 1
    assert keys[1][0] == keys[1][1] == cohort.trunk.host_key != keys[1][2]
    assert cohort.num_host_epochs == 3


def test_equal_seed_keys_on_one_lineage_are_one_incubation_whatever_blend_and_dwell():
    scripts = [
        [germinate(tempo_epochs=3)],
        [germinate(tempo_epochs=8, dwell_epochs=5)],
        [germinate(seed_lr_factor=2.0)],
    ]
    cohort = run(scripts, until=1)
    assert len(cohort.trunk.incubations) == 2


def test_pruning_an_incubating_seed_stays_on_the_lineage_and_pruning_a_blended_one_never_rejoins():
    early = [germinate(), act(Op.PRUNE)]
    late = [germinate(), act(Op.ADVANCE), act(Op.PRUNE)]
    cohort = run([early, late], until=4)
    assert cohort.riders[0].lineage is cohort.trunk
    assert cohort.riders[1].lineage is not cohort.trunk
    assert not cohort.trunk.incubations
    assert cohort.riders[1].lineage.network.grafts == {}
    assert len(cohort.riders[1].lineage.optimiser.param_groups) == 1


LIFE = [germinate(0, HEAVY), act(Op.ADVANCE), WAIT_ROW, WAIT_ROW, act(Op.FOSSILIZE)]


def test_a_fossil_belongs_to_the_committed_network_and_an_uncommitted_seed_does_not():
    cohort = run([LIFE, LIFE[:4]], batches_per_epoch=20)
    committed, held = (rider.outcome for rider in cohort.riders)
    assert (committed.num_fossils, held.num_fossils) == (1, 0)
    assert committed.seed_params == 308
    assert held.seed_params == 0
    assert committed.final_val_accuracy == committed.uncommitted_val_accuracy
    assert cohort.riders[1].slots[0].stage is Stage.HOLDING


def test_fossilizing_has_an_effect_on_the_gradients_and_the_learning_rate():
    seed = germinate(0, HEAVY, isolation=Isolation.ISOLATED, seed_lr_factor=2.0)
    cohort = run([[seed, *LIFE[1:]], [seed, *LIFE[1:4]]], until=5)
    fossil, held = (rider.lineage for rider in cohort.riders)
    assert [fossil.network.grafts[0].isolated, held.network.grafts[0].isolated] == [False, True]
    assert [fossil.optimiser.param_groups[1]["lr_factor"], held.optimiser.param_groups[1]["lr_factor"]] == [1.0, 2.0]
    member = next(iter(fossil.network.grafts[0].module.parameters()))
    assert "momentum_buffer" in fossil.optimiser.state[member]


def test_a_fork_leaves_its_parent_untouched():
    cohort = run([[germinate()], [germinate(), act(Op.ADVANCE)]], until=1)
    before = copy.deepcopy(weights(cohort.trunk))
    child = cohort.trunk.fork("child", set(cohort.trunk.incubations))
    child.network.host.head.weight.data.add_(1)
    next(iter(child.incubations.values())).module.body[0].weight.data.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(weights(cohort.trunk), before))
    assert next(iter(cohort.trunk.incubations.values())).module is not next(iter(child.incubations.values())).module


def test_the_learning_rate_follows_the_environments_clock_and_never_an_action():
    cohort = Cohort(tiny_environment(horizon=10), 11, ["host"] * 2)
    rates = []
    for _ in drive(cohort, [[], LIFE]):
        rates.append([r.lineage.optimiser.param_groups[0]["lr"] for r in cohort.riders])
    assert [a for a, _ in rates] == [b for _, b in rates] == [0.1] * 7 + [pytest.approx(0.01)] * 3


def test_an_invalid_action_is_refused_and_changes_nothing():
    cohort = Cohort(tiny_environment(), 11, ["host"] * 2)
    results = [applied for _, applied in drive(cohort, [[act(Op.FOSSILIZE), germinate(5)], []], 3)]
    assert [bool(r.executed_K[0]) for r in results] == [False, False, True]
    assert results[0].refused_by == ["mask:invalid_action", None]
    assert cohort.riders[0].lineage is cohort.trunk
    assert cohort.riders[0].executed_rows[0] == tuple(WAIT_ROW)
    assert cohort.riders[0].submitted_rows[0][0] == Op.FOSSILIZE


@pytest.mark.parametrize(
    ("caps", "germinable", "committable"), [({}, 2, 1), ({"max_seeds": 1}, 0, 1), ({"max_fossils": 0}, 2, 0)]
)
def test_caps_on_seeds_and_fossils_are_masks(caps, germinable, committable):
    cohort = Cohort(tiny_environment(**caps), 11, ["host"])
    mask = list(drive(cohort, [LIFE[:4]], 4))[-1][0].mask_KT[0]
    assert bool(mask[Op.GERMINATE]) == bool(germinable)
    assert bool(mask[Op.FOSSILIZE]) == bool(committable)


def test_a_host_that_diverges_ends_at_chance_and_one_with_a_poisoned_seed_loses_it_while_the_others_go_on():
    cohort = Cohort(tiny_environment(learning_rate=100.0, momentum=0.99, horizon=8, weight_decay=0.0), 11, ["host"] * 2)
    for observation, _ in drive(cohort, [[], LIFE]):
        assert not np.isinf(observation.matrix).any()
    ended = [rider for rider in cohort.riders if rider.diverged]
    assert ended
    for rider in ended:
        assert rider.outcome.final_val_accuracy == cohort.data.chance
    poisoned = Cohort(tiny_environment(), 11, ["host"] * 2)
    observation = poisoned.reset()
    observation, _ = poisoned.step(np.stack([germinate(), WAIT_ROW]), observation)
    observation, _ = poisoned.step(np.stack([act(Op.ADVANCE), WAIT_ROW]), observation)
    next(poisoned.riders[0].lineage.network.grafts[0].module.parameters()).data.fill_(math.nan)
    while not poisoned.done:
        observation, _ = poisoned.step(np.stack([WAIT_ROW, WAIT_ROW]), observation)
    assert [r.lineage.num_rollbacks for r in poisoned.riders] == [1, 0]
    assert [(r.diverged, r.num_steps) for r in poisoned.riders] == [(False, 6)] * 2
    assert poisoned.riders[0].slots[0].stage is Stage.EMBARGOED
    assert poisoned.control_outcome.final_val_accuracy == poisoned.riders[1].outcome.final_val_accuracy


def test_a_seed_that_is_not_finite_is_refused_by_g2():
    cohort = Cohort(tiny_environment(), 11, ["host"])
    observation = cohort.reset()
    observation, _ = cohort.step(germinate()[None], observation)
    next(next(iter(cohort.trunk.incubations.values())).module.parameters()).data.fill_(math.nan)
    _, applied = cohort.step(act(Op.ADVANCE)[None], observation)
    assert applied.refused_by == ["G2:weights_finite"]
    assert cohort.riders[0].slots[0].stage is Stage.TRAINING


def test_a_bigger_root_holds_committed_seeds_in_every_slot_from_the_start():
    cohort = Cohort(tiny_environment(), 11, ["bigger:conv_heavy", "wider:2", "host"])
    observation = cohort.reset()
    assert [s.stage for s in cohort.riders[0].slots] == [Stage.FOSSILIZED] * 3
    assert observation.mask_KT[0, : len(Op)].tolist() == [True, False, False, False, False]
    while not cohort.done:
        observation, _ = cohort.step(np.stack([WAIT_ROW] * 3), observation)
    bigger, wider, host = (rider.outcome for rider in cohort.riders)
    assert (bigger.seed_params, host.seed_params) == (6188, 0)
    assert wider.seed_params == cohort.costs["wider:2"].num_params - cohort.base_params > 0


@pytest.mark.parametrize("root", ["hosts", "bigger:heavy", "wider:much", "host:2"])
def test_an_unknown_root_is_an_error(root):
    with pytest.raises(SpecError):
        Cohort(tiny_environment(), 11, [root])


def test_a_step_past_the_horizon_is_an_error():
    cohort = run([[]])
    with pytest.raises(LifecycleError, match="horizon"):
        cohort.step(WAIT_ROW[None], cohort.observe())


def test_a_warm_start_trains_the_host_before_step_zero():
    cold, warm = (Cohort(tiny_environment(warm_start_epochs=n), 11, ["host"]) for n in (0, 3))
    cold.reset(), warm.reset()
    assert warm.trunk.history[0].val_loss < cold.trunk.history[0].val_loss


def test_costs_alone_and_shared_add_up():
    cohort = Cohort(tiny_environment(), 11, ["host"] * 4)
    scripts = [[], [germinate()], [germinate()], [germinate(1)]]
    for _ in drive(cohort, scripts, 1):
        pass
    costs = cohort.step_costs
    spent = cohort.trunk.cpu_s + sum(i.cpu_s for i in cohort.trunk.incubations.values())
    assert costs.cpu_s_shared_K.sum() == pytest.approx(spent)
    assert costs.cpu_s_alone_K[1] > costs.cpu_s_alone_K[0] > costs.cpu_s_shared_K[0]
    assert costs.flops_K[1] == costs.flops_K[2] > costs.flops_K[0] > 0
    assert costs.riders_K.tolist() == [4, 4, 4, 4]


def test_a_seed_held_longer_than_the_patience_is_pruned_from_the_host():
    cohort = Cohort(tiny_environment(holding_patience=1, horizon=8), 11, ["host"] * 2)
    seen = []
    for observation, _ in drive(cohort, [LIFE[:4], LIFE]):
        seen.append([rider.slots[0].stage for rider in cohort.riders])
        assert observation.matrix.shape[0] == 2
    assert [stage for stage, _ in seen[3:6]] == [Stage.HOLDING, Stage.PRUNED, Stage.EMBARGOED]
    assert seen[-1][1] is Stage.FOSSILIZED
    assert cohort.riders[0].lineage.network.grafts == {}
    assert cohort.riders[0].lineage.host_key not in {cohort.trunk.host_key, cohort.riders[1].lineage.host_key}
