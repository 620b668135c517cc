import numpy as np
import pyarrow as pa
import pytest

from esper.leyline.controller_specs import FixedSchedule, LearnedPolicy
from esper.leyline.errors import ControlError, IntegrityError, SpecError, UnknownNameError
from esper.leyline.identity import Role
from esper.leyline.keys import numpy_generator
from esper.leyline.library import load
from esper.leyline.pipelines import ControlBounds, EvaluationCell
from esper.leyline.rewards import EpisodeColumns, reward_components
from esper.leyline.schema import EPISODES, STEPS
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.verdict import Level
from esper.simic.evaluation import evaluate
from esper.simic.schedules import MAX_CANDIDATES, candidate_schedules, describe

HOST_PARAMS = 400
GAP = EvaluationCell(environment="digits-gap", reward="digits-gap", env_seeds=6, selection_seeds=3)
BOUNDS = ControlBounds(
    environment="digits-gap",
    never_act_percent=(22.0, 36.0),
    best_fixed_gain_points=(10.0, 100.0),
    best_fixed_lower_bound_points=5.0,
)
POLICY = LearnedPolicy(name="iql", path="nowhere", digest="0" * 64, sampled=True)


class FakeEngine:
    """Fabricates consistent tables: what an episode gains is decided by its controller and root alone, plus noise."""

    def __init__(self, *, noise_points=1.0):
        self.noise_points = noise_points
        self.plans = []
        self.gain_points = {"heuristic": 1.0, "random": 3.0, "iql": 18.0, "never-act": 0.0}
        self.extra_params = {"heuristic": 40, "random": 100, "iql": 300, "never-act": 0}
        self.invalid_replicates = set()
        self.edit = lambda plan, planned, row, steps: None

    def __call__(self, plans):
        self.plans += plans
        return [self.cohort(plan) for plan in plans]

    def worth(self, planned):
        """Return (gain, seed parameters, parameters the root has beyond the host)."""
        spec = planned.controller
        if planned.root.startswith("bigger"):
            return 24.0, 1000, 0
        if planned.root.startswith("wider"):
            return 8.0, 0, 240
        if isinstance(spec, FixedSchedule):
            heavy_in_0 = any(p.slot == 0 and p.blueprint == "conv_heavy" for p in spec.plants)
            return 10.0 * heavy_in_0 + 4.0 * len(spec.plants), 400 * len(spec.plants), 0
        return self.gain_points[spec.name], self.extra_params[spec.name], 0

    def cohort(self, plan):
        episodes, steps = [], []
        trunk = 0.28 + 0.02 * numpy_generator(plan.env_seed).standard_normal()
        for planned, episode_id in zip(plan.episodes, plan.episode_ids()):
            row, rows = self.episode(plan, planned, episode_id, trunk)
            self.edit(plan, planned, row, rows)
            episodes.append(row)
            steps += rows
        return {"episodes": table(episodes, EPISODES), "steps": table(steps, STEPS)}

    def episode(self, plan, planned, episode_id, trunk):
        gain, seed_params, root_params = self.worth(planned)
        if gain:
            gain += self.noise_points * numpy_generator(plan.env_seed, episode_id).standard_normal()
        host = HOST_PARAMS + root_params
        born = seed_params if planned.root.startswith("bigger") else 0
        present = np.array([born, *[seed_params] * 3], dtype=float)
        start = 0.1 + 0.02 * (root_params > 0)
        columns = EpisodeColumns(
            val_accuracy=np.array([start, 0.15, 0.2, 0.0]),
            control_val_accuracy=np.array([0.1, 0.12, 0.2, 0.0]),
            seed_params=present,
            host_params=host,
            final_val_accuracy=trunk + gain / 100,
            control_final_val_accuracy=trunk,
            final_seed_params=seed_params,
        )
        points, growth = reward_components(columns)
        rows = [
            {
                "episode_id": episode_id,
                "step": step,
                "is_last": step == 3,
                "val_accuracy": columns.val_accuracy[step],
                "control_val_accuracy": columns.control_val_accuracy[step],
                "seed_params": int(present[step]),
                "host_params": host,
                "reward_accuracy_points": points[step] if step < 3 else None,
                "reward_growth_log2": growth[step] if step < 3 else None,
            }
            for step in range(4)
        ]
        return {
            "episode_id": episode_id,
            "root": planned.root,
            "outcome": "completed",
            "final_val_accuracy": trunk + gain / 100,
            "final_test_accuracy": trunk + gain / 100 + 0.01,
            "control_final_val_accuracy": trunk,
            "control_final_test_accuracy": trunk + 0.01,
            "control_valid": plan.replicate not in self.invalid_replicates,
            "host_params": host,
            "final_seed_params": seed_params,
            "train_flops": 2e9 * (1 + seed_params / 1000),
        }, rows


def table(rows, schema):
    names = list(rows[0])
    return pa.table({name: pa.array([row[name] for row in rows], schema.field(name).type) for name in names})


def run(engine, *, cells=(GAP,), policies=None, bounds=(BOUNDS,), seen=None):
    evaluation = evaluate(
        cells,
        {"iql": POLICY} if policies is None else policies,
        run=engine,
        bounds=bounds,
        dataset="demo",
        version=1,
        verdict=Level.PASS,
        on_tables=(lambda tables: None) if seen is None else seen.append,
        wider_factor=lambda environment, flops: flops / 1e8,
    )
    return evaluation, {arm.arm: arm for arm in evaluation.arms}


def test_every_arm_meets_every_control_on_the_same_held_out_seeds():
    engine, seen = FakeEngine(), []
    evaluation, arms = run(engine, seen=seen)
    assert list(arms) == ["never-act", "random", "heuristic", "best-fixed", "bigger", "wider", "iql"]
    contests = [plan for plan in engine.plans if plan.replicate >= 200_000]
    assert [plan.replicate for plan in contests] == [200_000 + i for i in range(6)]
    assert all(len(plan.episodes) == 7 for plan in contests)
    assert {episode.role for plan in contests for episode in plan.episodes} == {Role.EVALUATION}
    assert set(arms["iql"].gain_over) == {"never-act", "heuristic", "best-fixed"}
    assert set(arms["heuristic"].return_over) == {"never-act", "best-fixed"}
    assert len(seen) == len(engine.plans)
    assert evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_the_best_schedule_has_the_highest_mean_return_on_selection_seeds_rent_included():
    engine = FakeEngine()
    evaluation, _ = run(engine)
    selections = [plan for plan in engine.plans if plan.replicate < 200_000]
    assert [plan.replicate for plan in selections] == [100_000, 100_001, 100_002]
    best = evaluation.best_fixed[0]
    assert best.description == "conv_heavy in slots 0, 1, 2 at epoch 0"
    assert best.selection_return == pytest.approx((22 - 3 * np.log2(1 + 1200 / 400)) / 9, abs=0.2)
    assert best.num_candidates == len(selections[0].episodes)
    assert best.num_selection_seeds == 3
    contest = engine.plans[-1]
    assert best.schedule in [episode.controller.name for episode in contest.episodes]


def test_gains_are_paired_test_points_and_returns_are_gain_minus_rent():
    _, arms = run(FakeEngine(noise_points=0.0))
    iql = arms["iql"]
    assert iql.gain_over["never-act"].mean == pytest.approx(18.0)
    assert iql.gain_over["heuristic"].mean == pytest.approx(17.0)
    assert iql.gain_over["best-fixed"].mean == pytest.approx(18.0 - 22.0)
    assert iql.gain_over["never-act"].high == pytest.approx(18.0)
    assert iql.mean_return.mean == pytest.approx((18.0 - 3 * np.log2(1 + 300 / 400)) / 9)
    assert iql.return_over["never-act"] == iql.mean_return.model_copy(update={"num_env_seeds": 6})
    assert (iql.seed_params, iql.growth_factor) == (300.0, pytest.approx(1.75))
    assert iql.train_gflops == pytest.approx(2.6)


def test_networks_from_scratch_pay_rent_for_everything_beyond_the_host():
    engine = FakeEngine(noise_points=0.0)
    _, arms = run(engine)
    roots = [episode.root for episode in engine.plans[-1].episodes]
    flops_per_epoch = 2e9 * (1 + 1200 / 1000) / 20
    assert roots[4:6] == ["bigger:conv_heavy", f"wider:{flops_per_epoch / 1e8}"]
    assert arms["bigger"].mean_return.mean == pytest.approx((24 - 3 * np.log2(1 + 1000 / 400)) / 9)
    assert arms["wider"].mean_return.mean == pytest.approx((8 - 3 * np.log2(1 + 240 / 400)) / 9)
    assert arms["wider"].growth_factor == pytest.approx(1.6)


def test_learned_policies_act_by_their_argmax_and_equal_episodes_run_once():
    engine = FakeEngine()
    _, arms = run(engine, policies={"iql": POLICY, "again": POLICY.model_copy(update={"path": "elsewhere"})})
    controllers = [episode.controller for episode in engine.plans[-1].episodes]
    assert [spec.sampled for spec in controllers if spec.kind == "policy"] == [False]
    assert arms["again"].mean_return.mean == arms["iql"].mean_return.mean


def test_controls_pass_on_a_healthy_run():
    evaluation, _ = run(FakeEngine())
    assert evaluation.failed_controls == ()
    assert len(evaluation.controls) == 5


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"never_act_percent": (40.0, 50.0)}, "never-act test accuracy (%)"),
        ({"best_fixed_gain_points": (-2.0, 2.0)}, "best fixed gain (points)"),
        ({"best_fixed_lower_bound_points": 21.9}, "lower 95 % bound of it (points)"),
    ],
)
def test_a_control_outside_its_bounds_fails(change, failing):
    evaluation, _ = run(FakeEngine(), bounds=[BOUNDS.model_copy(update=change)])
    assert [control.name for control in evaluation.failed_controls] == [failing]


def test_seeds_whose_trunk_is_not_valid_are_left_out_of_every_pair_and_counted():
    engine = FakeEngine()
    engine.invalid_replicates = {200_001, 200_004}
    evaluation, arms = run(engine)
    assert {arm.mean_return.num_env_seeds for arm in arms.values()} == {4}
    control = next(c for c in evaluation.controls if c.name == "seeds without a valid control")
    assert (control.value, control.passed) == (2, False)
    engine.invalid_replicates = {200_001}
    evaluation, _ = run(engine)
    assert evaluation.failed_controls == ()


def test_without_two_valid_seeds_there_is_no_comparison():
    engine = FakeEngine()
    engine.invalid_replicates = {200_000 + i for i in range(5)}
    with pytest.raises(ControlError, match="1 of 6"):
        run(engine)


def test_a_failed_episode_takes_its_seed_out_and_fails_a_control():
    engine = FakeEngine()

    def fail(plan, planned, row, steps):
        if plan.replicate == 200_003 and planned.controller.name == "random":
            row |= {"outcome": "failed", "final_test_accuracy": None, "final_val_accuracy": None}

    engine.edit = fail
    evaluation, arms = run(engine)
    assert arms["iql"].mean_return.num_env_seeds == 5
    assert [control.name for control in evaluation.failed_controls] == ["failed episodes"]


def test_diverged_episodes_count_and_stay_in():
    engine = FakeEngine()

    def diverge(plan, planned, row, steps):
        if planned.controller.name == "random" and plan.replicate == 200_002:
            row["outcome"] = "diverged"

    engine.edit = diverge
    _, arms = run(engine)
    assert (arms["random"].num_diverged, arms["random"].mean_return.num_env_seeds) == (1, 6)


def test_rewards_that_do_not_add_up_to_the_return_are_an_integrity_error():
    engine = FakeEngine()

    def tamper(plan, planned, row, steps):
        if planned.controller.name == "iql":
            steps[1]["reward_accuracy_points"] += 1e-4

    engine.edit = tamper
    with pytest.raises(IntegrityError, match="add up to"):
        run(engine)


def test_a_never_act_that_is_not_the_trunk_is_an_integrity_error():
    engine = FakeEngine()

    def tamper(plan, planned, row, steps):
        if planned.controller.name == "never-act" and planned.root == "host":
            row["final_test_accuracy"] += 0.001

    engine.edit = tamper
    with pytest.raises(IntegrityError, match="never-act is the trunk"):
        run(engine)


def test_a_missing_episode_is_an_integrity_error():
    class Forgetful(FakeEngine):
        def cohort(self, plan):
            tables = super().cohort(plan)
            return tables | {"episodes": tables["episodes"].slice(1)}

    with pytest.raises(IntegrityError, match="1 missing"):
        run(Forgetful())


def test_bad_requests_are_refused():
    with pytest.raises(SpecError, match="name of a control"):
        run(FakeEngine(), policies={"heuristic": POLICY})
    with pytest.raises(UnknownNameError, match="digits-gap"):
        run(FakeEngine(), bounds=[BOUNDS.model_copy(update={"environment": "digits-gat"})])
    with pytest.raises(SpecError, match="at least one"):
        run(FakeEngine(), cells=())


def gap(**changes):
    return load("environments", "digits-gap", EnvironmentSpec).model_copy(update=changes)


def test_candidates_are_distinct_within_the_limit_and_led_by_single_strong_seeds():
    found = candidate_schedules(gap())
    assert len({schedule.spec_id for schedule in found}) == len({schedule.name for schedule in found}) == len(found)
    assert len(found) == MAX_CANDIDATES == 16
    assert [len(schedule.plants) for schedule in found[:6]] == [1] * 6
    assert max(len(schedule.plants) for schedule in found) == 3
    everything = candidate_schedules(gap(), limit=100)
    assert {plant.blueprint for schedule in everything for plant in schedule.plants} == {
        "conv_heavy",
        "conv_light",
        "depthwise",
        "bottleneck",
    }
    assert len(everything) == 4 * 3 * 2 + 2 * 3 + 2
    assert all(schedule.plants for schedule in everything)


@pytest.mark.parametrize(("caps", "most"), [({"max_fossils": 1}, 1), ({"max_seeds": 2}, 2), ({}, 3)])
def test_no_candidate_plants_more_than_the_environment_allows(caps, most):
    assert max(len(schedule.plants) for schedule in candidate_schedules(gap(**caps), limit=100)) == most


def test_an_environment_without_fossils_has_no_schedule():
    with pytest.raises(SpecError, match="max_fossils 0"):
        candidate_schedules(gap(max_fossils=0))


def test_candidates_use_only_levers_that_the_environment_offers():
    for schedule in candidate_schedules(gap(tempos=(8, 12), dwells=(5,), seed_lr_factors=(0.5,))):
        for plant in schedule.plants:
            assert (plant.tempo_epochs, plant.dwell_epochs, plant.seed_lr_factor) == (8, 5, 0.5)


def test_schedules_are_described_in_words():
    names = {describe(schedule) for schedule in candidate_schedules(gap(), limit=100)}
    assert "conv_heavy in slot 0 at epoch 2" in names
    assert "conv_light in slots 0, 2 at epoch 0" in names
    slow = {describe(schedule) for schedule in candidate_schedules(gap(tempos=(8, 12)), limit=100)}
    assert "conv_heavy in slot 0 at epoch 2, blended over 8 epochs" in slow


TINY = """
name = "tiny"
learning_rate = 0.1
batch_size = 16
batches_per_epoch = 2
horizon = 8
[task]
kind = "digits"
sources = [64, 40, 40]
[host]
kind = "cnn"
channels = [2, 4]
kernels = [3, 1]
pools = [2, 2]
"""


def test_the_engines_own_tables_pass_every_check_and_the_whole_comparison_is_made(tmp_path):
    from esper.tolaria.rollout import run_cohort

    (tmp_path / "tiny.toml").write_text(TINY)
    cell = EvaluationCell(environment=str(tmp_path / "tiny.toml"), reward="digits-gap", env_seeds=2, selection_seeds=2)
    evaluation = evaluate(
        [cell],
        {},
        run=lambda plans: [run_cohort(plan) for plan in plans],
        bounds=[ControlBounds(environment=cell.environment, best_fixed_gain_points=(-100.0, 100.0))],
        dataset="tiny",
        version=1,
        verdict=None,
        on_tables=lambda tables: None,
    )
    arms = {arm.arm: arm for arm in evaluation.arms}
    assert len(arms) == 6
    assert evaluation.failed_controls == ()
    assert arms["best-fixed"].seed_params > 0
    assert arms["bigger"].growth_factor > 1
    assert arms["wider"].growth_factor > 1
    assert arms["wider"].train_gflops >= arms["best-fixed"].train_gflops
    assert (arms["never-act"].growth_factor, arms["never-act"].mean_return.mean) == (1.0, 0.0)
