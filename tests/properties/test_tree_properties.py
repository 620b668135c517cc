"""Operations on the tree equal brute force over its leaves, for any mask that a state can have."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import chisquare
from slot_states import random_masks

from esper.leyline.actions import TREE_WIDTH, check_mask, entries_of, is_canonical, is_valid, pack_mask, unpack_mask
from esper.leyline.keys import numpy_generator
from esper.leyline.tree import (
    NUM_UNIFORMS,
    entropy,
    enumerate_actions,
    expectation,
    kl_divergence,
    log_prob,
    log_softmax,
    sample,
    tree_argmax,
    tree_logsumexp,
    tree_max,
    uniform_logits,
)

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=12, derandomize=True, deadline=None)


def case(seed, scale=2.0):
    """Masks and two sets of logits."""
    mask = random_masks(seed)
    generator = np.random.default_rng(seed + 1)
    first, second = (generator.normal(0, scale, (len(mask), TREE_WIDTH)) for _ in range(2))
    return mask, first, second


def leaf_values(values, leaves):
    entries, read = entries_of(leaves)
    return np.where(read, values[entries], 0.0).sum(axis=1)


@given(seed=SEEDS)
@FEW
def test_masks_of_legal_states_are_consistent(seed):
    mask = random_masks(seed, num=16)
    check_mask(mask)
    np.testing.assert_array_equal(unpack_mask(pack_mask(mask)), mask)


@given(seed=SEEDS)
@FEW
def test_max_argmax_and_logsumexp_equal_brute_force(seed):
    mask, values, _ = case(seed)
    best, total, argmax = tree_max(values, mask), tree_logsumexp(values, mask), tree_argmax(values, mask)
    assert is_valid(argmax, mask).all()
    for row in range(len(mask)):
        leaves = enumerate_actions(mask[row])
        by_leaf = leaf_values(values[row], leaves)
        np.testing.assert_allclose(best[row], by_leaf.max(), atol=1e-5)
        np.testing.assert_allclose(total[row], logsumexp(by_leaf), atol=1e-5)
        np.testing.assert_array_equal(argmax[row], leaves[by_leaf.argmax()])


@given(seed=SEEDS)
@FEW
def test_probabilities_entropy_kl_and_expectation_equal_brute_force(seed):
    mask, first, second = case(seed)
    values = np.random.default_rng(seed).normal(size=mask.shape)
    logp, other = log_softmax(first, mask), log_softmax(second, mask)
    found_entropy, found_kl = entropy(logp, mask), kl_divergence(logp, other, mask)
    found_mean = expectation(logp, values, mask)
    for row in range(len(mask)):
        leaves = enumerate_actions(mask[row])
        rows = np.full(len(leaves), row)
        log_leaf = log_prob(logp[rows], leaves, mask[rows])
        log_other = log_prob(other[rows], leaves, mask[rows])
        probs = np.exp(log_leaf)
        np.testing.assert_allclose(probs.sum(), 1.0, atol=1e-5)
        np.testing.assert_allclose(found_entropy[row], -(probs * log_leaf).sum(), atol=1e-5)
        np.testing.assert_allclose(found_kl[row], (probs * (log_leaf - log_other)).sum(), atol=1e-5)
        np.testing.assert_allclose(found_mean[row], (probs * leaf_values(values[row], leaves)).sum(), atol=1e-5)


@given(seed=SEEDS)
@FEW
def test_every_sampled_action_is_valid_canonical_and_has_a_probability(seed):
    mask, logits, _ = case(seed, scale=6.0)
    uniforms = np.random.default_rng(seed).random((len(mask), NUM_UNIFORMS - 1))
    uniforms[0], uniforms[1] = 0.0, np.nextafter(1.0, 0.0)
    logp = log_softmax(logits, mask)
    actions = sample(logp, mask, uniforms)
    assert is_canonical(actions).all()
    assert is_valid(actions, mask).all()
    assert np.isfinite(log_prob(logp, actions, mask)).all()


@given(seed=SEEDS)
@FEW
def test_an_action_outside_the_mask_has_no_probability(seed):
    mask, logits, _ = case(seed)
    logp = log_softmax(logits, mask)
    everything = np.ones((1, TREE_WIDTH), dtype=bool)
    actions = sample(
        log_softmax(logits, np.repeat(everything, len(mask), 0)), everything.repeat(len(mask), 0), _uniforms(seed)
    )
    valid = is_valid(actions, mask)
    np.testing.assert_array_equal(np.isfinite(log_prob(logp, actions, mask)), valid)


def _uniforms(seed):
    return np.random.default_rng(seed).random((4, NUM_UNIFORMS - 1))


def test_sampling_frequencies_match_the_probabilities():
    num = 20_000
    for index, seed in enumerate((3, 11)):
        mask, logits, _ = case(seed, scale=1.0)
        row = int(mask.sum(axis=1).argmax())
        mask = np.repeat(mask[row : row + 1], num, axis=0)
        uniforms = numpy_generator("frequencies", index).random((num, NUM_UNIFORMS - 1))
        for values in (np.repeat(logits[row : row + 1], num, axis=0), uniform_logits(num)):
            logp = log_softmax(values, mask)
            actions = sample(logp, mask, uniforms)
            leaves = enumerate_actions(mask[0])
            probs = np.exp(log_prob(logp[: len(leaves)], leaves, mask[: len(leaves)]))
            place = {leaf.tobytes(): i for i, leaf in enumerate(leaves)}
            counts = np.bincount([place[action.tobytes()] for action in actions], minlength=len(leaves))
            common = probs * num >= 10
            observed = np.append(counts[common], counts[~common].sum())
            expected = np.append(probs[common], probs[~common].sum()) * num
            keep = expected > 1e-6
            assert chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-3
