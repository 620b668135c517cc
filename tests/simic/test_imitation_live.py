"""Live beside the heuristic, on the real engine: pairs, and decisions asked of both."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_specs import REWARD, tiny_environment

from esper.leyline.actions import ACTION_WIDTH, Op, is_forced, unpack_mask
from esper.leyline.controller_specs import HEURISTIC, Heuristic
from esper.leyline.errors import ControlError, IntegrityError, SpecError
from esper.leyline.identity import Role
from esper.leyline.imitation import ActionClass, classes_of
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.protocols import ActInputs, EpisodeStart
from esper.leyline.schema import ACTION_FIELDS
from esper.simic.imitation_live import compare_beside, plan_beside
from esper.simic.statistics import paired_interval
from esper.tamiyo.checkpoints import PolicyCard, save_checkpoint
from esper.tamiyo.imitation import ImitationNet, ImitationSpec
from esper.tamiyo.networks import seeded, single_thread
from esper.tamiyo.registry import build_controller
from esper.tolaria.rollout import run_cohort

EAGER = Heuristic(name="eager", min_epochs=1, plateau_epochs=1)
ENVIRONMENT = tiny_environment(horizon=12)


def checkpoint(folder, name: str, bias: list[float] | None = None):
    """A policy of random weights, or one that always wants the class of the greatest bias."""
    with seeded(4):
        net = ImitationNet(ImitationSpec(rules=EAGER))
    if bias is not None:
        torch.nn.init.zeros_(net.layers[-1].weight)
        net.layers[-1].bias.data = torch.tensor(bias)
    card = PolicyCard(
        name=name, algorithm="imitate", network=net.spec, recipe={}, rewards={}, training_seed=0
    )  # fmt: skip
    return save_checkpoint(folder / name, net, card)


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """Three environment seeds with a policy of random weights and an eager rule; plan, tables and comparison."""
    policy = checkpoint(tmp_path_factory.mktemp("live"), "p")
    beside = plan_beside(ENVIRONMENT, REWARD, rules=EAGER, policy=policy, num_env_seeds=3)
    with single_thread():
        tables = [run_cohort(plan) for plan in beside.plans]
        return beside, tables, compare_beside(beside, tables)


def episodes_of(met, arm):
    beside, tables, _ = met
    for plan, part in zip(beside.plans, tables):
        name = plan.identity(arm.episode).episode_id
        rows = sorted(
            (row for row in part["steps"].to_pylist() if row["episode_id"] == name), key=lambda row: row["step"]
        )
        yield plan, rows[:-1]


def stored(row) -> np.ndarray:
    return np.array([Op[row["op"]], *(row[field] for field in ACTION_FIELDS)], dtype=np.int8)


def asked_one_by_one(controller, plan, rows) -> np.ndarray:
    """What a controller decides along stored rows, asked row by row."""
    begin = EpisodeStart(
        environment=plan.environment, replicate=plan.replicate, repetition=0, epsilon=0.0, temperature=None
    )
    carry, actions = controller.start([begin]), []
    for row in rows:
        nan = float("nan")
        columns = {name: np.array([nan if row[name] is None else row[name]]) for name in FEATURE_COLUMNS}
        mask = unpack_mask(np.frombuffer(row["tree_mask"], dtype=np.uint8)[None])
        inputs = ActInputs(columns=columns, step_N=np.array([row["step"]]), mask_NT=mask, uniforms=np.zeros((1, 9)))
        decision = controller.act(inputs, carry)
        carry = decision.carry
        actions.append(decision.actions_NA[0])
    return np.array(actions).reshape(-1, ACTION_WIDTH)


def test_the_two_meet_on_selection_seeds_and_differences_are_paired(met):
    beside, tables, found = met
    assert [plan.replicate for plan in beside.plans] == [100_000, 100_001, 100_002]
    rows = [row for part in tables for row in part["episodes"].to_pylist()]
    assert {row["role"] for row in rows} == {Role.SELECTION.value}
    test = {
        name: np.array([100 * row["final_test_accuracy"] for row in rows if row["controller"] == name])
        for name in ("eager", "p")
    }
    key = ("imitation", ENVIRONMENT.name, "eager", "test", "difference")
    assert found.test_difference == paired_interval(test["p"], test["eager"], key=key)
    assert found.heuristic_test_percent.mean == pytest.approx(test["eager"].mean())
    difference = found.imitation_return.mean - found.heuristic_return.mean
    assert found.return_difference.mean == pytest.approx(difference)
    assert (found.num_env_seeds, found.num_left_out) == (3, 0)


@pytest.mark.parametrize("which", ["heuristic", "imitation"])
def test_agreement_is_what_asking_both_row_by_row_gives_and_an_arm_agrees_with_itself(met, which):
    beside, _, found = met
    arm = getattr(beside, which)
    controllers = {
        name: build_controller(getattr(beside, name).episode.controller) for name in ("heuristic", "imitation")
    }
    counts, forced, other = np.zeros((4, 4), dtype=int), 0, 0
    for plan, rows in episodes_of(met, arm):
        decided = {name: asked_one_by_one(controller, plan, rows) for name, controller in controllers.items()}
        np.testing.assert_array_equal(decided[which], [stored(row) for row in rows])
        for row, rule, policy in zip(rows, decided["heuristic"], decided["imitation"]):
            if is_forced(unpack_mask(np.frombuffer(row["tree_mask"], dtype=np.uint8)[None]))[0]:
                forced += 1
                continue
            pair = classes_of(np.array([rule])).item(), classes_of(np.array([policy])).item()
            counts[pair] += 1
            other += pair[0] == pair[1] and (rule != policy).any()
    agreement = getattr(found, f"on_{which}")
    np.testing.assert_array_equal(agreement.choices.counts, counts)
    assert (agreement.num_forced, agreement.num_other_action) == (forced, other)
    assert agreement.choices.num_wrong > 0


def test_a_policy_that_always_waits_disagrees_wherever_the_rule_acts(tmp_path):
    policy = checkpoint(tmp_path, "waits", bias=[1.0, 0.0, 0.0, 0.0])
    beside = plan_beside(ENVIRONMENT, REWARD, rules=EAGER, policy=policy, num_env_seeds=2)
    with single_thread():
        tables = [run_cohort(plan) for plan in beside.plans]
        found = compare_beside(beside, tables)
    episodes = [row for part in tables for row in part["episodes"].to_pylist()]
    for code, fields in (
        (ActionClass.GERMINATE, ["num_germinate"]),
        (ActionClass.ADVANCE, ["num_advance", "num_fossilize"]),
        (ActionClass.PRUNE, ["num_prune"]),
    ):
        acted = sum(row[field] for row in episodes if row["controller"] == "eager" for field in fields)
        assert found.on_heuristic.choices.num_wrong_of(code) == acted
    assert found.on_heuristic.choices.num_right(ActionClass.GERMINATE) > 0
    assert found.imitation_return.mean == 0.0
    assert set(np.nonzero(found.on_imitation.choices.counts)[1]) == {ActionClass.WAIT}


def test_what_cannot_be_compared_is_named(met, tmp_path):
    beside, tables, _ = met
    policy = checkpoint(tmp_path, "heuristic")
    with pytest.raises(SpecError, match="choose another"):
        plan_beside(ENVIRONMENT, REWARD, rules=HEURISTIC, policy=policy, num_env_seeds=2)
    with pytest.raises(SpecError, match="at least 2"):
        plan_beside(ENVIRONMENT, REWARD, rules=EAGER, policy=policy, num_env_seeds=1)
    with pytest.raises(IntegrityError, match="2 came back"):
        compare_beside(beside, tables[:2])
    broken = [break_control(part) for part in tables[:2]]
    with pytest.raises(ControlError, match="1 of 3"):
        compare_beside(beside, [*broken, tables[2]])
    one_left_out = compare_beside(beside, [tables[0], tables[1], break_control(tables[2])])
    assert (one_left_out.num_env_seeds, one_left_out.num_left_out) == (2, 1)


def break_control(part):
    episodes = part["episodes"]
    index = episodes.column_names.index("control_valid")
    invalid = pa.array([False] * len(episodes))
    return {**part, "episodes": episodes.set_column(index, episodes.schema.field(index), invalid)}
