"""Families as cells: blocks of members, the bandit, algorithms, selection. Engines are made up, but for one test."""

import numpy as np
import pytest
from test_evaluation import FakeEngine

from esper.leyline.bandit import BanditSpec
from esper.leyline.controller_specs import FixedSchedule, LearnedPolicy, TrialKeep
from esper.leyline.errors import ControlError, SpecError
from esper.leyline.identity import Role
from esper.leyline.pipelines import EvaluationCell
from esper.simic.evaluation import evaluate
from esper.simic.selection import select

MEMBERS = 8
BANDIT = BanditSpec(pulls=40, pulls_per_round=8, blueprints=("conv_heavy", "conv_light"), births=(0,), tempos=(3,))
MIX = EvaluationCell(environment="digits-mix", reward="digits-mix", env_seeds=4, selection_seeds=2, bandit=BANDIT)


def policies(*names):
    return {name: LearnedPolicy(name=name, path=name, digest=f"{i:064}") for i, name in enumerate(names)}


class Mix(FakeEngine):
    """What a seed gains depends on its slot and the member: slot 1 is best on average, slot 0 on one member alone."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.gain_points |= {name: 5.0 + 2.0 * seed for seed, name in enumerate(("iql-s0", "iql-s1", "iql-s2"))}
        self.gain_points |= {"bc": 3.0, "trial": 9.0}
        self.extra_params |= dict.fromkeys(("iql-s0", "iql-s1", "iql-s2", "bc", "trial"), 0)
        self.member = ""

    def cohort(self, plan):
        self.member = plan.environment.name
        return super().cohort(plan)

    def worth(self, planned):
        spec = planned.controller
        if isinstance(spec, FixedSchedule):
            slot, heavy = spec.plants[0].slot, spec.plants[0].blueprint == "conv_heavy"
            if self.member == "digits-mix-k311-narrow0" and slot == 0:
                return 40.0, 0, 0
            return (6.0, 12.0, 1.0)[slot] + 3.0 * heavy, 0, 0
        return super().worth(planned)


def run(engine, cell=MIX, of=(), **fields):
    return evaluate(
        [cell],
        policies(*of),
        run=engine,
        bounds=[],
        dataset="mix",
        version=1,
        verdict=None,
        on_tables=lambda tables: None,
        wider_factor=lambda environment, flops: 2.0,
        **fields,
    )


@pytest.fixture(scope="module")
def mixed():
    engine = Mix()
    names = ("iql-s0", "iql-s1", "iql-s2", "bc")
    return engine, run(engine, of=names, predicted={"bc": {}, "iql-s0": {"digits-mix-k311-narrow0": 1.5}})


def test_one_schedule_is_chosen_for_all_members_by_the_pooled_return(mixed):
    _, evaluation = mixed
    best, bandit = evaluation.best_fixed[0], evaluation.bandits[0]
    assert (best.environment, best.num_selection_seeds) == ("digits-mix", 2)
    assert best.description == "conv_heavy in slot 1 at epoch 0"
    assert best.selection_return == pytest.approx(15 / 9, abs=0.1)
    assert bandit.description == best.description
    assert (bandit.num_arms, bandit.num_pulls, bandit.num_lost) == (6, 40, 0)


def test_all_arms_of_a_member_and_a_seed_meet_in_one_cohort(mixed):
    engine, evaluation = mixed
    contests = [plan for plan in engine.plans if plan.replicate >= 200_000]
    assert len(contests) == MEMBERS * 4
    assert len({plan.env_seed for plan in contests}) == 4
    assert all(len(plan.episodes) == 10 for plan in contests)  # the bandit's schedule is the best fixed one
    assert len(evaluation.arms) == 11
    assert len(evaluation.members) == 11 * MEMBERS
    assert evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_the_bandit_pulls_members_in_rotation_on_selection_seeds_of_its_own(mixed):
    engine, evaluation = mixed
    pulls = [plan for plan in engine.plans if 110_000 <= plan.replicate < 200_000]
    names = list(evaluation.families["digits-mix"])
    assert [plan.environment.name for plan in pulls] == names * 5
    assert [plan.replicate for plan in pulls[::MEMBERS]] == [110_000 + block for block in range(5)]
    assert {episode.role for plan in pulls for episode in plan.episodes} == {Role.SELECTION}


def test_pooled_numbers_are_means_of_blocks_and_intervals_are_over_environment_seeds(mixed):
    _, evaluation = mixed
    pooled = next(arm for arm in evaluation.arms if arm.arm == "best-fixed")
    own = [arm for arm in evaluation.members if arm.arm == "best-fixed"]
    assert pooled.environment == "digits-mix"
    assert pooled.mean_return.num_env_seeds == 4
    assert pooled.mean_return.mean == pytest.approx(np.mean([arm.mean_return.mean for arm in own]))
    widths = [arm.mean_return.high - arm.mean_return.low for arm in own]
    assert pooled.mean_return.high - pooled.mean_return.low < np.mean(widths)


def test_controller_seeds_of_an_algorithm_stand_as_one_row(mixed):
    _, evaluation = mixed
    pooled = [found for found in evaluation.algorithms if found.environment == "digits-mix"]
    assert [(found.algorithm, found.policies) for found in pooled] == [("iql", ("iql-s0", "iql-s1", "iql-s2"))]
    iql = pooled[0]
    assert (iql.mean_return.num_controller_seeds, iql.mean_return.num_env_seeds) == (3, 4)
    assert iql.mean_return.mean == pytest.approx(7 / 9, abs=0.1)
    assert iql.return_over["best-fixed"].mean == pytest.approx(-8 / 9, abs=0.1)
    assert set(iql.iqm_return_over) == {"never-act", "heuristic", "best-fixed", "bandit"}
    assert len(evaluation.algorithms) == 1 + MEMBERS


def test_predictions_stand_beside_what_they_speak_of(mixed):
    _, evaluation = mixed
    told = {(arm.environment, arm.arm): arm.predicted_return for arm in (*evaluation.arms, *evaluation.members)}
    assert told["digits-mix", "iql-s0"] is None
    assert told["digits-mix-k311-narrow0", "iql-s0"] == 1.5


def test_a_seed_without_a_control_on_one_member_leaves_its_whole_block_out():
    engine = Mix(noise_points=0.0)

    def spoil(plan, planned, row, steps):
        if plan.environment.name == "digits-mix-k311-narrow0" and plan.replicate == 200_001:
            row["control_valid"] = False

    engine.edit = spoil
    evaluation = run(engine)
    assert {arm.mean_return.num_env_seeds for arm in evaluation.arms} == {3}
    members = {arm.environment: arm.mean_return.num_env_seeds for arm in evaluation.members}
    assert members.pop("digits-mix-k311-narrow0") == 3
    assert set(members.values()) == {4}
    assert evaluation.controls[0].value == 1


def test_a_trial_is_an_arm_and_needs_a_name_of_its_own():
    trial = TrialKeep(name="trial", slots=(0, 1, 2))
    cell = MIX.model_copy(update={"trials": (trial,), "bandit": None})
    arms = {arm.arm: arm for arm in run(Mix(noise_points=0.0), cell).arms}
    assert (arms["trial"].group, arms["trial"].gain_over["never-act"].mean) == ("rule", pytest.approx(9.0))
    assert "bandit" not in arms
    with pytest.raises(SpecError, match="another arm"):
        run(Mix(), cell, of=["trial"])


def test_a_bandit_whose_pulls_tell_nothing_is_an_error():
    engine = Mix()
    engine.invalid_replicates = set(range(110_000, 110_010))
    with pytest.raises(ControlError, match="none of the 40"):
        run(engine)


def test_selection_tries_the_best_three_by_prediction_and_the_best_live_one_wins():
    engine = Mix()
    predicted = {"iql-s0": 3.0, "iql-s1": 2.0, "iql-s2": 1.0, "bc": 2.5}
    found = select([MIX], policies(*predicted), predicted, run=engine, dataset="mix", version=1)
    assert [trial.policy for trial in found.candidates] == ["iql-s0", "bc", "iql-s1", "iql-s2"]
    assert [trial.live_return is None for trial in found.candidates] == [False, False, False, True]
    assert found.winner == "iql-s1"
    assert found.candidates[2].live_return == pytest.approx(7 / 9, abs=0.1)
    assert {plan.replicate for plan in engine.plans} == {100_000, 100_001}
    with pytest.raises(SpecError, match="finite number"):
        select([MIX], policies("bc"), {"bc": float("nan")}, run=engine, dataset="mix", version=1)


FAMILY = """
name = "tiny-mix"
[environment]
learning_rate = 0.1
batch_size = 16
batches_per_epoch = 2
horizon = 7
max_fossils = 1
tempos = [3]
dwells = [1]
[environment.task]
kind = "digits"
sources = [64, 40, 40]
[environment.host]
kind = "cnn"
channels = [2, 4]
[[members]]
name = "a"
kernels = [3, 1]
pools = [2, 2]
[[members]]
name = "b"
kernels = [1, 1]
pools = [2, 2]
"""


def test_the_engine_itself_carries_out_a_comparison_on_a_family(tmp_path):
    from esper.tolaria.rollout import run_cohort

    path = tmp_path / "tiny-mix.toml"
    path.write_text(FAMILY)
    bandit = BanditSpec(pulls=4, pulls_per_round=2, blueprints=("conv_light",), births=(0,), tempos=(3,))
    trial = TrialKeep(name="keep-largest", slots=(0, 1), incubation_epochs=1)
    cell = EvaluationCell(
        environment=str(path),
        reward="digits-mix",
        env_seeds=2,
        selection_seeds=2,
        bandit=bandit,
        trials=(trial,),
    )
    evaluation = evaluate(
        [cell],
        {},
        run=lambda plans: [run_cohort(plan) for plan in plans],
        bounds=[],
        dataset="tiny",
        version=1,
        verdict=None,
        on_tables=lambda tables: None,
        wider_factor=lambda environment, flops: 2.0,
    )
    arms = {arm.arm: arm for arm in evaluation.arms}
    assert evaluation.failed_controls == ()
    assert (arms["keep-largest"].growth_factor > 1, arms["bandit"].growth_factor > 1) == (True, True)
    assert arms["never-act"].mean_return.mean == 0.0
    assert list(evaluation.families.values()) == [("tiny-mix-a", "tiny-mix-b")]
