from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from engine_specs import plan_of, tiny_environment

from esper.leyline.actions import WAIT_ROW, Action, Blend, Isolation, Op
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, behaviour
from esper.leyline.identity import extend_host_key
from esper.leyline.library import load
from esper.leyline.matrix import PlannedEpisode
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.plans import COMPLETE
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import LIVE_STAGES, Stage
from esper.tolaria.branching import branch_episode
from esper.tolaria.cohort import Cohort
from esper.tolaria.executor import SerialExecutor
from esper.tolaria.governor import MAX_ROLLBACKS, Panic, diagnose, remember_where_due
from esper.tolaria.lineage import EpochMetrics, Lineage
from esper.tolaria.rollout import CohortRun, run_cohort
from esper.tolaria.tasks import set_data_folder

LIGHT, HEAVY = 6, 7
PLANT = Action(op=Op.GERMINATE, slot=0, blueprint=LIGHT).to_row()
FIRST = [PLANT, Action(op=Op.ADVANCE, slot=0).to_row()]
LIFE = [*FIRST, WAIT_ROW, WAIT_ROW, Action(op=Op.FOSSILIZE, slot=0).to_row()]
SECOND = [WAIT_ROW] * 5 + [Action(op=Op.GERMINATE, slot=1, blueprint=HEAVY).to_row()]


class Breaks(SerialExecutor):
    """Puts a NaN into the hosts of chosen epochs, after training them."""

    def __init__(self, *epochs: int, where=lambda lineage: True) -> None:
        self.epochs, self.where = epochs, where

    def run_epoch(self, lineages, data, env_seed, epoch):
        if epoch in self.epochs:
            for lineage in filter(self.where, lineages):
                next(lineage.network.host.parameters()).data.fill_(math.nan)
        super().run_epoch(lineages, data, env_seed, epoch)


def drive(cohort: Cohort, scripts, until: int | None = None):
    observation = cohort.reset()
    for step in range(until or cohort.spec.horizon):
        rows = [script[step] if step < len(script) else WAIT_ROW for script in scripts]
        observation, _ = cohort.step(np.stack(rows), observation)
        yield observation


def state_of(lineage: Lineage) -> dict[str, torch.Tensor]:
    """Weights, buffers and momentum of the host and its fossils."""
    network, found = lineage.network, {}
    modules = {"host": network.host, **{str(slot): g.module for slot, g in network.grafts.items() if g.fossil}}
    for prefix, module in modules.items():
        found |= {f"{prefix}.{name}": value.clone() for name, value in module.state_dict().items()}
        for name, weight in module.named_parameters():
            entries = lineage.optimiser.state.get(weight, {})
            found |= {f"{prefix}.{name}.{k}": v.clone() for k, v in entries.items() if isinstance(v, torch.Tensor)}
    return found


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("optimiser", [{}, {"optimiser": "adam", "learning_rate": 0.003}], ids=["sgd", "adam"])
def test_a_broken_host_returns_by_value_to_its_last_good_state_and_the_clock_goes_on(optimiser):
    cohort = Cohort(tiny_environment(horizon=10, **optimiser), 11, ["host"], Breaks(7))
    for observation in drive(cohort, [[]]):
        if cohort.step_index == 5:
            good, key = state_of(cohort.trunk), cohort.trunk.host_key
        if cohort.step_index == 8:
            assert_equal(state_of(cohort.trunk), good)
            (what,) = cohort.interventions
            assert (what.reason, what.epoch, what.restored_epoch) == (Panic.NON_FINITE, 7, 5)
            assert (what.host_key, what.after_key) == (key, extend_host_key(key, ("rollback", 8)))
            assert cohort.trunk.host_key == what.after_key
            assert cohort.trunk.history[-1].val_accuracy == cohort.trunk.history[5].val_accuracy
            assert math.isnan(cohort.trunk.history[-1].train_loss)
        else:
            assert cohort.interventions == []
        assert observation.step == cohort.step_index == len(cohort.trunk.history) - 1
    assert (cohort.trunk.num_rollbacks, cohort.trunk.lr_scale) == (1, 0.5)
    rate = cohort.spec.learning_rate_at(9)
    assert [group["lr"] for group in cohort.trunk.optimiser.param_groups] == [rate / 2]
    assert [rider.num_steps for rider in cohort.riders] == [10]


def test_a_host_that_breaks_a_third_time_has_diverged_and_ends_at_chance():
    plan = plan_of([PlannedEpisode(controller=NeverAct())], tiny_environment(horizon=8))
    run = CohortRun.of(plan, Breaks(1, 2, 4))
    tables = run.recorder.tables("here")
    (episode,) = tables["episodes"].to_pylist()
    assert MAX_ROLLBACKS == 2
    assert (episode["outcome"], episode["num_steps"], episode["num_rollbacks"]) == ("diverged", 5, 2)
    assert episode["final_val_accuracy"] == episode["final_test_accuracy"] == run.cohort.data.chance
    assert episode["control_valid"] is False
    assert_no_row_holds_a_number_that_is_not_finite(tables["steps"])
    last = tables["steps"].to_pylist()[-1]
    assert (last["val_loss"], last["train_loss"]) == (None, None)
    assert last["val_accuracy"] == np.float32(run.cohort.data.chance)


class Explodes(Breaks):
    """Reports an exploding loss of chosen epochs, with everything else finite."""

    def run_epoch(self, lineages, data, env_seed, epoch):
        SerialExecutor.run_epoch(self, lineages, data, env_seed, epoch)
        if epoch in self.epochs:
            for lineage in lineages:
                lineage.history[-1].train_loss = 1e6


def test_nothing_measured_of_a_broken_host_is_shown_whether_it_was_rolled_back_or_given_up():
    cohort = Cohort(tiny_environment(horizon=6), 11, ["host"], Explodes(1, 2, 4))
    seen = list(drive(cohort, [[]]))
    change = [observation.matrix[0, FEATURE_COLUMNS.index("host_weight_change")] for observation in seen[:5]]
    assert cohort.riders[0].diverged
    assert [math.isnan(value) for value in change] == [False, True, True, False, True]


def assert_no_row_holds_a_number_that_is_not_finite(steps: pa.Table) -> None:
    for name in steps.column_names:
        if pa.types.is_floating(steps[name].type):
            assert pc.all(pc.is_finite(steps[name].drop_null())).as_py() is not False, name


def test_a_rollback_prunes_the_live_seeds_of_every_rider_and_keeps_fossils_and_cooldowns():
    scripts = [[PLANT], FIRST, LIFE + SECOND[5:], LIFE]
    cohort = Cohort(tiny_environment(horizon=10, isolations=(Isolation.COADAPT,)), 11, ["host"] * 4, Breaks(6))
    before = {}
    for _ in drive(cohort, scripts):
        stages = [[slot.stage for slot in rider.slots] for rider in cohort.riders]
        if cohort.step_index == 6:
            before = stages
            assert cohort.riders[2].lineage is cohort.riders[3].lineage
            fossil = state_of(cohort.riders[2].lineage)
        if cohort.step_index == 7:
            break
    assert [b[0] for b in before] == [Stage.TRAINING, Stage.HOLDING, Stage.FOSSILIZED, Stage.FOSSILIZED]
    assert before[2][1] == Stage.TRAINING
    assert [s[0] for s in stages] == [Stage.PRUNED, Stage.PRUNED, Stage.FOSSILIZED, Stage.FOSSILIZED]
    assert stages[2][1] == Stage.PRUNED
    assert cohort.riders[2].lineage is cohort.riders[3].lineage
    assert {rider.lineage.host_key for rider in cohort.riders} == set(cohort.flock.lineages)
    assert all(not lineage.incubations for lineage in cohort.flock.lineages.values())
    assert [len(rider.lineage.network.grafts) for rider in cohort.riders] == [0, 0, 1, 1]
    groups = cohort.riders[2].lineage.optimiser.param_groups
    assert [len(group["params"]) > 0 for group in groups] == [True, True]
    names = {name for name in fossil if name.startswith("0.")}
    assert names <= set(state_of(cohort.riders[2].lineage))
    assert sorted(what.riders for what in cohort.interventions) == [(0,), (1,), (2, 3)]
    assert {what.riders: what.pruned for what in cohort.interventions} == {(0,): 1, (1,): 1, (2, 3): 1}
    observation = cohort.observe()
    while not cohort.done:
        observation, _ = cohort.step(np.stack([WAIT_ROW] * 4), observation)
    assert [rider.diverged for rider in cohort.riders] == [False] * 4
    assert cohort.riders[2].outcome.num_fossils == 1


@pytest.mark.parametrize("blend", [Blend.LINEAR, Blend.GATED])
def test_the_state_at_a_fork_is_the_parents_without_the_unfinished_seed_and_at_a_fossilization_with_the_fossil(blend):
    life = [WAIT_ROW] * 2 + [Action(op=Op.GERMINATE, slot=0, blueprint=LIGHT, blend=blend).to_row(), *LIFE[1:]]
    cohort = Cohort(tiny_environment(horizon=8), 11, ["host"])
    good = {}
    for _ in drive(cohort, [life]):
        lineage = cohort.riders[0].lineage
        good.setdefault(lineage.host_key, (cohort.step_index, lineage.good))
    states = list(good.values())
    assert [(step, state.epochs) for step, state in states] == [(1, 0), (4, 3), (7, 6)]
    fossils = {name.split(".")[0] for name in states[2][1].tensors} - {"host"}
    assert fossils == ({"fossil0", "gate0"} if blend is Blend.GATED else {"fossil0"})
    assert all(name.startswith("host.") for name in states[1][1].tensors)


def test_a_fork_shares_the_good_state_and_a_later_epoch_does_not_change_it():
    cohort = Cohort(tiny_environment(), 11, ["host"])
    for _ in drive(cohort, [[]], until=1):
        good = cohort.trunk.good
        kept = {name: tensor.clone() for name, tensor in good.tensors.items()}
    assert copy.deepcopy(cohort.trunk).good is good
    observation = cohort.observe()
    for _ in range(3):
        observation, _ = cohort.step(WAIT_ROW[None], observation)
    assert cohort.trunk.good is good
    assert all(torch.equal(good.tensors[name], value) for name, value in kept.items())
    assert not torch.equal(next(cohort.trunk.network.host.parameters()), next(iter(kept.values())))


def test_two_lineages_that_roll_back_in_the_same_epoch_stay_two():
    cohort = Cohort(tiny_environment(), 11, ["host"] * 2, Breaks(3))
    for _ in drive(cohort, [FIRST, []], until=4):
        pass
    ours, trunk = (rider.lineage for rider in cohort.riders)
    assert (ours.num_rollbacks, trunk.num_rollbacks) == (1, 1)
    assert ours is not trunk
    assert ours.host_key != trunk.host_key


def test_an_episode_that_left_before_the_trunk_broke_is_completed_with_an_invalid_control():
    episodes = [
        PlannedEpisode(controller=FixedSchedule(name="early", plants=(Plant(slot=0, blueprint="conv_light"),))),
        PlannedEpisode(controller=NeverAct()),
    ]
    plan = plan_of(episodes, tiny_environment(horizon=8))
    breaks = Breaks(4, where=lambda lineage: not lineage.network.grafts)
    run = CohortRun.of(plan, breaks)
    rows = {row["controller"]: row for row in run.recorder.tables("here")["episodes"].to_pylist()}
    told = {name: (row["outcome"], row["num_rollbacks"], row["control_valid"]) for name, row in rows.items()}
    assert told == {"early": ("completed", 0, False), "never-act": ("rolled_back", 1, False)}


def test_a_branch_from_a_prefix_with_a_rollback_repeats_it():
    spec = tiny_environment(horizon=9, schedule="drops", lr_drops=((3, 3000.0), (4, 1 / 3000.0)))
    run = CohortRun.of(
        plan_of([PlannedEpisode(controller=behaviour("random"), epsilon=1.0)], spec), keep_snapshots=True
    )
    steps = run.recorder.tables("here")["steps"]
    assert run.cohort.riders[0].lineage.num_rollbacks == 1
    for at in (4, 7):
        rows = [np.array(row, dtype=np.int8) for row in run.cohort.riders[0].submitted_rows[at:]]
        again = branch_episode(run, 0, at, rows, PlannedEpisode(controller=COMPLETE))["steps"]
        for name in ("host_key", "state_id", "val_accuracy", "num_rollbacks", "s0_stage", "s1_stage"):
            assert again[name].to_pylist() == steps[name].to_pylist(), (at, name)


@pytest.mark.parametrize("learning_rate", [30.0, 100.0])
def test_a_learning_rate_that_diverges_from_the_start_is_given_up_within_a_few_epochs(learning_rate):
    spec = load("environments", "digits-gap", EnvironmentSpec).model_copy(update={"learning_rate": learning_rate})
    tables = run_cohort(plan_of([PlannedEpisode(controller=NeverAct())], spec))
    (episode,) = tables["episodes"].to_pylist()
    assert (episode["outcome"], episode["num_rollbacks"], episode["control_valid"]) == ("diverged", 2, False)
    assert episode["num_steps"] <= 6
    assert_no_row_holds_a_number_that_is_not_finite(tables["steps"])


@pytest.mark.parametrize(("factor", "reason"), [(300.0, Panic.EXPLODING_LOSS), (30.0, Panic.COLLAPSE)])
def test_a_burst_of_the_learning_rate_is_undone_and_the_run_goes_on_learning(factor, reason):
    real = load("environments", "digits-gap", EnvironmentSpec).model_dump()
    burst = {"schedule": "drops", "lr_drops": ((7, factor), (8, 1 / factor)), "horizon": 11}
    cohort = Cohort(EnvironmentSpec.parse({**real, **burst}), 5, ["host"])
    found = []
    for _ in drive(cohort, [[]]):
        found += [(cohort.step_index, what.reason, what.restored_epoch) for what in cohort.interventions]
    assert [(why, restored) for _, why, restored in found] == [(reason, 5)]
    assert found[0][0] in (8, 9)
    history = cohort.trunk.history
    assert history[-1].train_accuracy > history[5].train_accuracy > 0.15
    assert cohort.control_outcome.final_val_accuracy > 0.15


@pytest.mark.parametrize(
    ("environment", "learning_rate"), [("digits-gap", 0.3), ("digits-gap", 0.1), ("digits-baseline", 0.3)]
)
def test_ordinary_training_with_heavy_seeds_and_a_constant_rate_never_panics(environment, learning_rate):
    spec = load("environments", environment, EnvironmentSpec)
    spec = spec.model_copy(update={"learning_rate": learning_rate, "schedule": "constant", "horizon": 12})
    heavy = tuple(Plant(slot=slot, blueprint="conv_heavy", seed_lr_factor=2.0) for slot in range(3))
    schedule = PlannedEpisode(controller=FixedSchedule(name="heavy", plants=heavy))
    run = CohortRun.of(plan_of([schedule], spec, replicate=7))
    assert run.cohort.riders[0].lineage.num_rollbacks == run.cohort.trunk.num_rollbacks == 0
    assert run.cohort.riders[0].num_fossils() > 0


@pytest.mark.parametrize(
    ("peak", "now", "batches", "panics"),
    [
        (0.30, 0.11, 15, True),
        (0.30, 0.13, 15, False),
        (0.19, 0.10, 15, False),
        (0.30, math.nan, 15, False),
        (0.30, 0.10, 1, False),
    ],
)
def test_a_collapse_is_chance_again_after_having_been_well_above_it(peak, now, batches, panics):
    spec = tiny_environment(batch_size=128, batches_per_epoch=batches)
    cohort = Cohort(spec, 11, ["host"])
    cohort.reset()
    cohort.trunk.peak_train_accuracy = peak
    cohort.trunk.history.append(EpochMetrics(train_loss=2.3, train_accuracy=now, val_loss=2.3, val_accuracy=0.1))
    assert diagnose(cohort.trunk, cohort.data) == (Panic.COLLAPSE if panics else None)


def test_a_host_on_its_way_down_is_no_state_to_return_to_unless_a_fossil_would_be_lost():
    cohort = Cohort(tiny_environment(), 11, ["host"])
    for _ in drive(cohort, [LIFE], until=4):
        pass
    lineage = cohort.riders[0].lineage
    lineage.peak_train_accuracy, lineage.history[-1].train_accuracy = 0.4, 0.2
    remember_where_due(cohort.flock, cohort.data, set())
    assert lineage.good.epochs == 1
    lineage.history[-1].train_accuracy = 0.3
    remember_where_due(cohort.flock, cohort.data, set())
    assert lineage.good.epochs == 4
    cohort.flock.step, lineage.history[-1].train_accuracy = 5, 0.2
    lineage.commit(0)
    remember_where_due(cohort.flock, cohort.data, set())
    assert lineage.good.epochs == 5


def test_a_root_that_was_never_sound_is_given_up_without_a_rollback():
    cohort = Cohort(tiny_environment(warm_start_epochs=3, learning_rate=100.0, momentum=0.99), 11, ["host"])
    cohort.reset()
    cohort.trunk.good, cohort.trunk.non_finite = None, True
    cohort.step(WAIT_ROW[None], cohort.observe())
    assert (cohort.riders[0].diverged, cohort.trunk.num_rollbacks) == (True, 0)
    assert not any(slot.stage in LIVE_STAGES for slot in cohort.riders[0].slots)


@pytest.mark.slow
@pytest.mark.skipif("ESPER_DATA" not in os.environ and "CIFAR10_DIR" not in os.environ, reason="needs CIFAR-10")
def test_on_cifar10_a_diverging_rate_is_given_up_a_burst_undone_and_ordinary_training_left_alone():
    set_data_folder(Path(os.environ.get("ESPER_DATA") or os.environ["CIFAR10_DIR"]))
    real = load("environments", "cifar16-gap", EnvironmentSpec)
    burst = {"schedule": "drops", "lr_drops": ((7, 500.0), (8, 1 / 500.0)), "horizon": 12}
    rates = {"diverges": {"learning_rate": 30.0}, "burst": burst, "ordinary": {"schedule": "constant"}}
    heavy = tuple(Plant(slot=slot, blueprint="conv_heavy") for slot in range(3))
    episodes = [
        PlannedEpisode(controller=NeverAct()),
        PlannedEpisode(controller=FixedSchedule(name="heavy", plants=heavy)),
    ]
    told = {}
    for name, changes in rates.items():
        tables = run_cohort(plan_of(episodes, EnvironmentSpec.parse({**real.model_dump(), **changes})))
        assert_no_row_holds_a_number_that_is_not_finite(tables["steps"])
        told[name] = set(tables["episodes"]["outcome"].to_pylist())
        if name == "burst":
            assert min(tables["episodes"]["final_val_accuracy"].to_pylist()) > 0.2
    assert told.pop("diverges") <= {"diverged", "rolled_back"}
    assert told == {"burst": {"rolled_back"}, "ordinary": {"completed"}}
