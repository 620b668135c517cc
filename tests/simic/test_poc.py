"""The arms of the proof of concept, and what is made of their episodes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from engine_specs import tiny_environment
from scipy import stats

from esper.kasmina.blueprints.cnn import SCALE_GAIN
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.identity import EVALUATION_START
from esper.leyline.poc import RunOrigin
from esper.simic.poc import StoredEpisode, poc_table
from esper.simic.poc_arms import (
    GROWTH_REFERENCES,
    bigger_flops_per_epoch,
    growth_arms,
    middle_slot,
    plan_arms,
    published_life,
)
from esper.simic.poc_incubation import (
    BIRTH_EPOCH,
    PROBES,
    arm_results,
    centred,
    correlation,
    cost_ratios,
    gains,
    plan_incubation,
    probe_correlations,
)
from esper.simic.poc_sunk_cost import sunk_cost_arms
from esper.tolaria.cohort import Cohort
from esper.tolaria.rollout import CohortRun, run_cohort

ORIGIN = RunOrigin(command="c", machine={}, code_commit="x", source="s", digest="d", ended_at="t", wall_s=1.0)


def stored(test, *, params=500, control=0.2, cpu_s=1.0, flops=1e9, outcome="completed"):
    return StoredEpisode(
        outcome=outcome,
        test_accuracy=test,
        control_test_accuracy=control,
        params=params,
        num_fossils=1,
        train_flops=flops,
        cpu_s=cpu_s,
    )


def test_the_published_schedule_at_25_epochs_is_10_5_5_5():
    life = published_life(25)
    assert (life.birth_epoch, life.dwell_epochs, life.tempo_epochs, life.drop_epoch) == (10, 5, 5, 15)


@pytest.mark.parametrize("horizon", range(5, 60))
def test_every_scaled_schedule_commits_within_its_horizon(horizon):
    life = published_life(horizon)
    assert life.birth_epoch >= 0
    assert life.drop_epoch + life.tempo_epochs <= horizon - 1  # FOSSILIZE is the last decision at the latest


def test_four_epochs_are_too_few_for_a_life():
    with pytest.raises(SpecError, match="at least 5"):
        published_life(4)


def test_growth_arms_are_paired_have_equal_epochs_and_the_drop_where_their_names_say_so():
    arms = growth_arms(tiny_environment(horizon=8), 2.0)
    plans = plan_arms(arms, 2)
    assert {plan.replicate for plan in plans} == {EVALUATION_START, EVALUATION_START + 1}
    assert len({(plan.replicate, plan.env_seed) for plan in plans}) == 2
    assert {arm.environment.horizon for arm in arms} == {8}
    for arm in arms:
        falls = arm.environment.learning_rate_at(7) < arm.environment.learning_rate_at(0)
        assert falls == (arm.name not in ("host", "bigger"))
    assert len({episode_id for plan in plans for episode_id in plan.planned_ids()}) == 2 * len(arms)


def test_the_published_arm_freezes_the_host_while_the_seed_is_isolated_and_commits_one_seed():
    arms = {arm.name: arm for arm in growth_arms(tiny_environment(horizon=8), 2.0)}
    (plan,) = plan_arms([arms["published"]], 1)
    life = published_life(8)
    assert plan.environment.host_frozen_epochs == (life.birth_epoch, life.drop_epoch)
    changes = []
    run = CohortRun.of(plan, watch=lambda cohort, applied: changes.append(cohort.riders[0].lineage.host_weight_change))
    (row,) = run.recorder.tables("c")["episodes"].to_pylist()
    assert row["num_fossils"] == 1
    frozen = changes[1 + life.birth_epoch : 1 + life.drop_epoch]
    assert frozen == [0.0] * life.dwell_epochs
    assert changes[life.birth_epoch] > 0


def test_the_wider_host_is_matched_to_the_operations_that_the_bigger_network_is_charged():
    environment = tiny_environment(horizon=6)
    arms = {arm.name: arm for arm in growth_arms(environment, 2.0)}
    (plan,) = plan_arms([arms["bigger-drop"]], 1)
    charged = run_cohort(plan)["episodes"]["train_flops"][0].as_py()
    expected = 6 * bigger_flops_per_epoch(environment, [middle_slot(environment)])
    assert charged == pytest.approx(expected, rel=1e-9)


def test_sunk_cost_controls_get_the_operations_of_the_grown_network_or_a_little_more():
    arms = sunk_cost_arms(tiny_environment(), warm_epochs=2, further_epochs=5)
    flops = {}
    for arm in arms:
        (plan,) = plan_arms([arm], 1)
        (row,) = run_cohort(plan)["episodes"].to_pylist()
        flops[arm.name] = row["train_flops"]
    assert flops["new-bigger"] == pytest.approx(flops["grown"], rel=1e-9)
    one_host_epoch = flops["continued-same-epochs"] / 5
    assert flops["grown"] <= flops["continued"] * (1 + 1e-9) < flops["grown"] + one_host_epoch
    assert flops["grown-by-actions"] < flops["grown"]
    assert flops["bigger-whole-bill"] >= flops["grown"] + 2 * one_host_epoch


def test_a_grown_root_is_the_trained_host_until_its_first_further_epoch():
    environment = tiny_environment(warm_start_epochs=2)
    roots = ["grown:conv_heavy", "grown:conv_heavy@mid", "host", "bigger:conv_heavy@mid"]
    cohort = Cohort(environment, 5, roots)
    cohort.reset()
    grown, one, host, bigger = (rider.lineage for rider in cohort.riders)
    assert grown.history[-1] == one.history[-1] == host.history[-1]
    assert bigger.history[-1] != host.history[-1]
    assert sorted(grown.seeds) == [0, 1, 2]
    assert sorted(one.seeds) == sorted(bigger.seeds) == [1]


def test_an_ordinary_root_is_the_bigger_network_without_a_zero_at_birth():
    roots = ["bigger:conv_heavy@mid", "ordinary:conv_heavy@mid", "host", "ordinary:bottleneck"]
    cohort = Cohort(tiny_environment(), 5, roots)
    cohort.reset()
    bigger, ordinary, host, bottleneck = (rider.lineage for rider in cohort.riders)
    assert bigger.history[-1] == host.history[-1] != ordinary.history[-1]
    bodies = [lineage.network.grafts[1].module for lineage in (bigger, ordinary)]
    same = {name: value for name, value in bodies[0].state_dict().items() if not name.startswith("scale")}
    assert all((bodies[1].state_dict()[name] == value).all() for name, value in same.items())
    assert (bodies[1].scale.weight == 1 / SCALE_GAIN).all()
    assert all(graft.module[-1].weight.any() for graft in bottleneck.network.grafts.values())
    assert ordinary.seeds[1].num_params == bigger.seeds[1].num_params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "task": {"kind": "tinystories", "context": 6, "vocabulary": 40, "rows": (16, 16, 16)},
            "host": {"kind": "transformer", "layers": 3, "heads": 2, "embed": 8},
        },
    ],
    ids=["cnn", "transformer"],
)
def test_no_blueprint_of_an_ordinary_root_is_the_identity_at_birth(changes):
    environment = tiny_environment(**changes)
    cohort = Cohort(environment, 5, [f"ordinary:{blueprint}@mid" for blueprint in environment.blueprints])
    cohort.reset()
    bare = cohort.trunk.history[-1].val_loss
    assert [rider.root for rider in cohort.riders if rider.lineage.history[-1].val_loss == bare] == []


@pytest.mark.parametrize(
    ("root", "what"),
    [("grown:conv_huge", "blueprint"), ("grown:conv_heavy@middle", "slot"), ("bigger:@mid", "blueprint")],
)
def test_a_root_with_an_unknown_blueprint_or_slot_is_a_spec_error(root, what):
    with pytest.raises(SpecError, match=f"unknown {what}"):
        Cohort(tiny_environment(), 1, [root])


def test_a_table_has_paired_differences_and_counts_what_diverged():
    environment = tiny_environment(horizon=8)
    arms = growth_arms(environment, 2.0)
    episodes = {}
    for number, arm in enumerate(arms):
        for seed, plan in enumerate(plan_arms([arm], 3)):
            diverged = arm.name == "wider-drop" and seed == 2
            outcome = "diverged" if diverged else "completed"
            episodes[plan.episode_ids()[0]] = stored(0.3 + 0.01 * number + 0.1 * seed, outcome=outcome)

    def table(of):
        return poc_table(
            "growth", environment, arms, GROWTH_REFERENCES, num_seeds=3, episodes=of, notes=(), origin=ORIGIN
        )

    found = {arm.name: arm for arm in table(episodes).arms}
    assert found["host"].test_accuracy_percent.mean == pytest.approx(40.0)
    assert found["host"].differences["host-drop"].mean == pytest.approx(-1.0)
    assert found["host"].differences["host-drop"].high == pytest.approx(-1.0)  # the same on every seed
    assert "host-drop" not in found["host-drop"].differences
    assert (found["wider-drop"].num_diverged, found["host"].num_diverged) == (1, 0)
    assert found["host"].test_percent_by_seed == pytest.approx((30.0, 40.0, 50.0))
    gone = episodes.popitem()[0]
    with pytest.raises(IntegrityError, match=gone):
        table(episodes)


def test_incubation_trials_advance_after_exactly_1_3_and_6_epochs():
    environment = tiny_environment(horizon=11, batches_per_epoch=1)
    plans, trials = plan_incubation(environment, 1)
    own = next(plan for plan in plans if plan.environment.incubation == "own_pass")
    keep = [t for t in trials if (t.incubation, t.blueprint, t.slot) == ("own_pass", "conv_light", 0)]
    ids = {trial.episode_id for trial in keep}
    small = own.model_copy(
        update={
            "episodes": tuple(e for e, name in zip(own.episodes, own.episode_ids()) if name in ids),
            "branches": tuple(b for b, name in zip(own.branches, own.branch_ids()) if name in ids),
        }
    )
    tables = run_cohort(small)
    for trial in keep:
        rows = [row for row in tables["steps"].to_pylist() if row["episode_id"] == trial.episode_id]
        ops = [row["op"] for row in sorted(rows, key=lambda row: row["step"])]
        assert ops.index("ADVANCE") - ops.index("GERMINATE") == trial.incubation_epochs
        assert ops.index("GERMINATE") == BIRTH_EPOCH
    committed = tables["episodes"]["num_fossils"].to_pylist()
    assert committed == [1, 1, 1]


def test_correlations_are_pearsons_overall_and_within_seeds():
    plans, trials = plan_incubation(tiny_environment(horizon=11), 2)
    generator = np.random.default_rng(3)
    gain = {trial.episode_id: float(generator.normal()) for trial in trials}
    probe = {trial.episode_id: float(generator.normal()) for trial in trials}
    rows = []
    for trial in trials:
        for step in range(12):
            row = {"episode_id": trial.episode_id, "step": step}
            row |= {f"s{slot}_{name}": None for slot in range(3) for name in PROBES}
            row[f"s{trial.slot}_val_loss_drop"] = probe[trial.episode_id]
            rows.append(row)
    found = probe_correlations(trials, gain, pa.Table.from_pylist(rows))
    cell = next(
        c for c in found if (c.incubation, c.incubation_epochs, c.probe, c.epoch) == ("own_pass", 3, "val_loss_drop", 2)
    )
    group = [t for t in trials if (t.incubation, t.incubation_epochs) == ("own_pass", 3)]
    x, y = (np.array([of[t.episode_id] for t in group]) for of in (probe, gain))
    assert cell.overall == pytest.approx(stats.pearsonr(x, y).statistic)
    seeds = np.array([t.replicate for t in group])
    centre = [np.concatenate([v[seeds == s] - v[seeds == s].mean() for s in (200_000, 200_001)]) for v in (x, y)]
    assert cell.within == pytest.approx(stats.pearsonr(*centre).statistic)
    assert next(c for c in found if c.probe == "train_loss_drop").overall is None
    assert correlation(np.ones(5), np.arange(5.0)) is None
    assert centred(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1])).tolist() == [-1.0, 1.0, 0.0]
    assert len(plans) == 4


def test_gains_and_costs_are_paired_over_the_two_ways():
    _, trials = plan_incubation(tiny_environment(horizon=11), 2)
    own = {trial.episode_id: trial.incubation == "own_pass" for trial in trials}
    episodes = {
        name: stored(0.5 if mine else 0.4, cpu_s=3.0 if mine else 2.0, flops=2e9 if mine else 1e9)
        for name, mine in own.items()
    }
    gain = gains(trials, episodes)
    arms = arm_results(trials, gain, ["early", "mid", "late"])
    assert {(a.incubation, round(a.gain_points.mean, 6)) for a in arms} == {("own_pass", 30.0), ("linearised", 20.0)}
    assert all(len(arm.gain_points.values) == 2 for arm in arms)
    assert len(arms) == 2 * 3 * 2 * 3
    for cost in cost_ratios(trials, episodes):
        assert (cost.cpu_ratio.mean, cost.operations_ratio.mean) == pytest.approx((1.5, 2.0))
    episodes.popitem()
    with pytest.raises(IntegrityError, match="not stored"):
        gains(trials, episodes)
