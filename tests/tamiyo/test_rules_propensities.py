"""Propensities: what is returned is the exact probability of what was drawn."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from scripted import Script, World, environment, episode, observe

from esper.leyline.actions import NUM_OPS, OP_SLICE, Op
from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS, HEURISTIC, FixedSchedule, Plant, UniformRandom
from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.stages import Stage
from esper.leyline.tree import NUM_UNIFORMS, enumerate_actions, log_prob, log_softmax, uniform_logits
from esper.tamiyo.mixing import op_distribution, uniform_log_probs
from esper.tamiyo.registry import build_controller

SMALL = {
    **{"blends": ("linear",), "tempos": (3, 5), "dwells": (3,), "seed_lr_factors": (1.0,)},
    **{"isolations": ("coadapt",), "default_isolation": "coadapt"},
}


def mixed_world(step: int = 9, **options) -> World:
    """A training seed that may advance, a held one that may be committed, a free slot."""
    world = World(environment(4, **{**SMALL, **options}), Script(), step=step)
    world.stage[0], world.epochs[0], world.levers[0] = Stage.TRAINING, 4, (0, 0, 0, 2, 1, 1)
    world.stage[2], world.epochs[2], world.levers[2] = Stage.HOLDING, 1, (1, 0, 0, 2, 1, 1)
    return world


def repeated(world: World, num: int, key: str):
    """One observation, many keyed draws."""
    inputs = observe([world])
    return replace(
        inputs,
        columns={name: np.repeat(values, num) for name, values in inputs.columns.items()},
        step_N=np.repeat(inputs.step_N, num),
        mask_NT=np.repeat(inputs.mask_NT, num, axis=0),
        uniforms=numpy_generator("propensity", key).random((num, NUM_UNIFORMS)),
    )


def mixture_probabilities(controller, world, start, leaves):
    """(1 - epsilon) * rule + epsilon * u of every valid action, from the proposal and brute-force enumeration."""
    inputs = observe([world])
    carry = controller.start([start])
    proposal = controller.propose(inputs, carry)
    scores = proposal.scores_NO[0]
    if start.temperature is None:
        rule = np.eye(NUM_OPS)[scores.argmax()]
    else:
        weights = np.exp((scores - scores.max()) / start.temperature)
        rule = weights / weights.sum()
    mask = np.repeat(inputs.mask_NT, len(leaves), axis=0)
    uniform = np.exp(log_prob(log_softmax(uniform_logits(len(leaves)), mask), leaves, mask))
    by_rule = np.array([rule[leaf[0]] * (leaf == proposal.completions_NOA[0, leaf[0]]).all() for leaf in leaves])
    return (1 - start.epsilon) * by_rule + start.epsilon * uniform


def test_u_equals_the_masked_softmax_of_equal_logits():
    worlds = [mixed_world(), World(environment(2))]
    mask = observe(worlds).mask_NT
    np.testing.assert_allclose(uniform_log_probs(mask), log_softmax(uniform_logits(2), mask), atol=1e-12)


@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", ["baseline", "periodic"])
def test_logp_is_the_mixture_formula_and_frequencies_follow_it(name, epsilon, temperature):
    world, num = mixed_world(step=10), 3000
    start = episode(world.env, epsilon=epsilon, temperature=temperature)
    controller = build_controller(ELEVEN_BEHAVIOURS[name])
    inputs = repeated(world, num, f"{name} {epsilon} {temperature}")
    decision = controller.act(inputs, controller.start([start] * num))
    leaves = enumerate_actions(inputs.mask_NT[0])
    expected = mixture_probabilities(controller, world, start, leaves)
    assert expected.sum() == pytest.approx(1.0)
    place = {leaf.tobytes(): index for index, leaf in enumerate(leaves)}
    drawn = np.array([place[action.tobytes()] for action in decision.actions_NA])
    np.testing.assert_allclose(decision.logp_N, np.log(expected[drawn]), atol=1e-9)
    by_op = np.bincount(leaves[:, 0], weights=expected, minlength=NUM_OPS)
    np.testing.assert_allclose(decision.op_probs, np.tile(by_op, (num, 1)), atol=1e-9)
    counts = np.bincount(drawn, minlength=len(leaves))
    common = expected * num >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * num
    if (wanted > 0).sum() > 1:
        keep = wanted > 0
        assert chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def test_mean_importance_weight_of_u_is_one():
    world, num = mixed_world(), 10000
    start = episode(world.env, epsilon=0.2)
    controller = build_controller(HEURISTIC)
    inputs = repeated(world, num, "importance")
    decision = controller.act(inputs, controller.start([start] * num))
    logu = log_prob(uniform_log_probs(inputs.mask_NT), decision.actions_NA, inputs.mask_NT)
    weights = np.exp(logu - decision.logp_N)
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(num)


def test_the_random_behaviour_returns_the_exact_probability_of_u():
    worlds = [mixed_world(), World(environment()), mixed_world(tempos=(3, 5, 8, 12))]
    inputs = observe(worlds, key="random")
    controller = build_controller(UniformRandom())
    decision = controller.act(inputs, controller.start([episode(epsilon=1.0)] * 3))
    logp = log_softmax(uniform_logits(3), inputs.mask_NT)
    np.testing.assert_allclose(decision.logp_N, log_prob(logp, decision.actions_NA, inputs.mask_NT))
    np.testing.assert_allclose(decision.op_probs, np.exp(logp[:, OP_SLICE]))


def test_without_noise_the_action_is_certain_and_is_the_argmax_of_the_scores():
    controller = build_controller(HEURISTIC)
    inputs = observe([mixed_world(), World(environment(), step=7), World(environment(), step=1)])
    carry = controller.start([episode()] * 3)
    decision = controller.act(inputs, carry)
    np.testing.assert_array_equal(decision.logp_N, 0.0)
    np.testing.assert_array_equal(decision.actions_NA[:, 0], controller.propose(inputs, carry).scores_NO.argmax(axis=1))
    np.testing.assert_array_equal(decision.op_probs.max(axis=1), 1.0)


def test_rows_of_one_block_have_their_own_epsilon_and_temperature():
    world = mixed_world()
    inputs = repeated(world, 3, "rows")
    controller = build_controller(HEURISTIC)
    starts = [episode(world.env), episode(world.env, epsilon=0.5), episode(world.env, temperature=1.0)]
    together = controller.act(inputs, controller.start(starts))
    for index, start in enumerate(starts):
        alone = controller.act(
            replace(
                inputs,
                columns={name: values[index : index + 1] for name, values in inputs.columns.items()},
                step_N=inputs.step_N[index : index + 1],
                mask_NT=inputs.mask_NT[index : index + 1],
                uniforms=inputs.uniforms[index : index + 1],
            ),
            controller.start([start]),
        )
        np.testing.assert_array_equal(together.actions_NA[index], alone.actions_NA[0])
        assert together.logp_N[index] == alone.logp_N[0]


def test_a_fixed_schedule_mixes_like_any_rule():
    plan = FixedSchedule(name="one", plants=(Plant(slot=1, blueprint="conv_light", birth_epoch=0),))
    world, num = World(environment(**SMALL)), 4000
    controller = build_controller(plan)
    inputs = repeated(world, num, "schedule")
    decision = controller.act(inputs, controller.start([episode(world.env, epsilon=0.4)] * num))
    planned = (decision.actions_NA == decision.actions_NA[decision.logp_N.argmax()]).all(axis=1)
    probability = 0.6 + 0.4 * (1 / 2) * (1 / 3) * (1 / 8) * (1 / 2)
    np.testing.assert_allclose(decision.logp_N[planned], np.log(probability))
    assert abs(planned.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / num)
    np.testing.assert_allclose(decision.op_probs[0], [0.2, 0.8, 0, 0, 0])


def test_rounding_never_draws_a_masked_op():
    scores = np.array([[0.0, -np.inf, 1.0, -np.inf, -np.inf]])
    probs = op_distribution(scores, np.array([1.0]))
    assert probs[0, Op.GERMINATE] == 0
    controller = build_controller(HEURISTIC)
    inputs = replace(observe([mixed_world()]), uniforms=np.full((1, NUM_UNIFORMS), np.nextafter(1.0, 0.0)))
    decision = controller.act(inputs, controller.start([episode(temperature=0.01)]))
    assert np.isfinite(decision.logp_N[0])


@pytest.mark.parametrize(("field", "value"), [("epsilon", 1.5), ("epsilon", -0.1), ("temperature", 0.0)])
def test_impossible_noise_is_refused(field, value):
    with pytest.raises(SpecError, match=field):
        build_controller(HEURISTIC).start([episode(**{field: value})])
