"""The torch tree equals leyline's and the enumeration of every leaf, and its gradients are finite."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline import tree
from esper.leyline.actions import LEVERS, MAX_SLOTS, TREE_WIDTH, Op, check_mask, lever_slice, slot_slice
from esper.leyline.errors import MaskError
from esper.leyline.keys import numpy_generator
from esper.tamiyo import tree_blocks, tree_gradients, tree_torch

ROWS = 6


def random_masks(rng: np.random.Generator, num: int) -> np.ndarray:
    """Consistent masks with few enough leaves to enumerate."""
    mask = np.zeros((num, TREE_WIDTH), dtype=bool)
    mask[:, Op.WAIT] = True
    for op in list(Op)[1:]:
        mask[:, slot_slice(op)] = rng.random((num, MAX_SLOTS)) < rng.choice([0.0, 0.3, 0.6])
        mask[:, op] = mask[:, slot_slice(op)].any(axis=1)
    for slot in range(MAX_SLOTS):
        here = mask[:, slot_slice(Op.GERMINATE)][:, slot]
        for lever in range(len(LEVERS)):
            part = lever_slice(slot, lever)
            width = part.stop - part.start
            choices = rng.random((num, width)) < 0.4
            choices[np.arange(num), rng.integers(width, size=num)] = True
            mask[:, part] = choices & here[:, None]
    check_mask(mask)
    return mask


def case(seed: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    rng = numpy_generator("test-tree", seed)
    mask = random_masks(rng, ROWS)
    values = 3 * rng.normal(size=(ROWS, TREE_WIDTH))
    return values, mask, torch.tensor(values), torch.tensor(mask)


def leaves(values: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The additive value of every valid leaf of each row."""
    found = []
    for row in range(len(mask)):
        actions = torch.tensor(tree.enumerate_actions(mask[row]))
        flat = torch.tensor(values[row]).expand(len(actions), -1)
        found.append(tree_torch.path_sum(flat, actions).numpy())
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_reductions_equal_leyline_and_the_enumeration(seed: int) -> None:
    values, mask, values_t, mask_t = case(seed)
    brute = leaves(values, mask)
    largest = tree_torch.maximum(values_t, mask_t).numpy()
    np.testing.assert_allclose(largest, tree.tree_max(values, mask), atol=1e-9)
    np.testing.assert_allclose(largest, [part.max() for part in brute], atol=1e-9)
    total = tree_gradients.logsumexp(values_t.float(), mask_t).numpy()
    np.testing.assert_allclose(total, tree.tree_logsumexp(values, mask), atol=1e-5)
    np.testing.assert_allclose(total, [np.logaddexp.reduce(part) for part in brute], atol=1e-5)
    np.testing.assert_array_equal(tree_torch.argmax(values_t, mask_t).numpy(), tree.tree_argmax(values, mask))
    other = torch.flip(values_t, dims=(1,))
    at_best = tree_torch.path_sum(other, tree_torch.argmax(values_t, mask_t))
    torch.testing.assert_close(tree_torch.at_argmax(other, values_t, mask_t), at_best)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_policies_normalise_and_entropy_kl_and_expectation_are_exact(seed: int) -> None:
    values, mask, values_t, mask_t = case(seed)
    other_t = values_t.flip(1)
    logp, other = tree_torch.log_softmax(values_t, mask_t), tree_torch.log_softmax(other_t, mask_t)
    np.testing.assert_allclose(logp.numpy(), tree.log_softmax(values, mask), atol=1e-9)
    by_leaf, other_by_leaf, values_by_leaf = (leaves(part.numpy(), mask) for part in (logp, other, other_t))
    np.testing.assert_allclose([np.exp(part).sum() for part in by_leaf], 1.0, atol=1e-5)
    entropy = [-(np.exp(part) * part).sum() for part in by_leaf]
    np.testing.assert_allclose(tree_torch.entropy(logp, mask_t).numpy(), entropy, atol=1e-5)
    kl = [(np.exp(p) * (p - q)).sum() for p, q in zip(by_leaf, other_by_leaf)]
    np.testing.assert_allclose(tree_torch.kl_divergence(logp, other, mask_t).numpy(), kl, atol=1e-5)
    mean = [(np.exp(p) * v).sum() for p, v in zip(by_leaf, values_by_leaf)]
    np.testing.assert_allclose(tree_torch.expectation(logp, other_t, mask_t).numpy(), mean, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_samples_and_their_log_probability_equal_leyline(seed: int) -> None:
    values, mask, values_t, mask_t = case(seed)
    uniforms = numpy_generator("test-tree-draws", seed).random((ROWS, 8))
    logp = tree.log_softmax(values, mask)
    logp_t = tree_torch.log_softmax(values_t, mask_t)
    actions = tree.sample(logp, mask, uniforms)
    drawn = tree_torch.sample(logp_t, mask_t, torch.tensor(uniforms))
    np.testing.assert_array_equal(drawn.numpy(), actions)
    np.testing.assert_allclose(tree_torch.log_prob(logp_t, drawn).numpy(), tree.log_prob(logp, actions, mask))


def test_split_and_join_are_inverse() -> None:
    flat = torch.arange(2.0 * TREE_WIDTH).reshape(2, TREE_WIDTH)
    assert torch.equal(tree_blocks.join(tree_blocks.split(flat, 0.0)), flat)


def test_an_action_that_is_not_valid_has_log_probability_minus_infinity() -> None:
    mask = torch.zeros(1, TREE_WIDTH, dtype=torch.bool)
    mask[0, Op.WAIT] = True
    logp = tree_torch.log_softmax(torch.zeros(1, TREE_WIDTH), mask)
    prune = torch.tensor([[int(Op.PRUNE), 2, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    assert tree_torch.log_prob(logp, prune).item() == -torch.inf


def test_gradients_are_finite_and_zero_where_masked_even_with_whole_groups_masked() -> None:
    for seed in range(5):
        _, _, values_t, mask_t = case(seed)
        mask_t[0, 1:] = False
        leaf = values_t.float().requires_grad_()
        logp = tree_torch.log_softmax(leaf, mask_t)
        wait = torch.zeros(ROWS, 8, dtype=torch.int8)
        loss = (
            tree_torch.log_prob(logp, wait)
            + tree_torch.entropy(logp, mask_t)
            + tree_torch.normalised_entropy(logp, mask_t)
            + tree_torch.kl_divergence(logp, tree_torch.log_softmax(leaf * 2, mask_t), mask_t)
            + tree_torch.maximum(leaf, mask_t)
            + tree_gradients.logsumexp(leaf, mask_t)
            + tree_torch.expectation(logp, leaf, mask_t)
        ).sum()
        loss.backward()
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[~mask_t] == 0).all()
        assert (leaf.grad[0, 1:] == 0).all()


def test_one_valid_action_has_no_entropy_and_a_uniform_policy_has_all_of_it() -> None:
    mask = torch.zeros(1, TREE_WIDTH, dtype=torch.bool)
    mask[0, Op.WAIT] = True
    logp = tree_torch.log_softmax(torch.zeros(1, TREE_WIDTH), mask)
    assert tree_torch.entropy(logp, mask).item() == 0
    assert tree_torch.normalised_entropy(logp, mask).item() == 0
    full = torch.ones(1, TREE_WIDTH, dtype=torch.bool)
    uniform = tree_torch.log_softmax(torch.zeros(1, TREE_WIDTH), full)
    assert tree_torch.normalised_entropy(uniform, full).item() == pytest.approx(1 + 0.8 + 0.2, abs=1e-6)


def test_stepwise_choice_of_the_best_below_is_the_best_leaf_and_raw_logits_favour_likely_ops() -> None:
    mask = torch.zeros(1, TREE_WIDTH, dtype=torch.bool)
    mask[0, [Op.WAIT, Op.GERMINATE]] = True
    mask[0, slot_slice(Op.GERMINATE)] = True
    mask[0, 29:] = True
    logits = torch.zeros(1, TREE_WIDTH)
    logits[0, Op.GERMINATE] = 2.0
    logp = tree_torch.log_softmax(logits, mask)
    assert tree_torch.greedy(logp, mask)[0, 0] == Op.GERMINATE
    assert tree_torch.argmax(logp, mask)[0, 0] == Op.WAIT


def test_the_log_probability_of_an_action_is_that_of_the_whole_policy_and_so_is_its_gradient() -> None:
    for seed in range(20):
        _, _, values, mask = case(seed)
        logp = tree_torch.log_softmax(values, mask)
        drawn = tree_torch.sample(logp, mask, torch.rand(ROWS, 8, generator=torch.Generator().manual_seed(seed)))
        for actions in (drawn, drawn[:1].expand(ROWS, -1)):  # of another row: not valid in some
            direct, whole = (values.clone().requires_grad_() for _ in range(2))
            found = tree_gradients.action_log_prob(direct, mask, actions)
            expected = tree_torch.log_prob(tree_torch.log_softmax(whole, mask), actions)
            torch.testing.assert_close(found, expected)
            finite = torch.isfinite(expected)
            found[finite].sum().backward()
            expected[finite].sum().backward()
            torch.testing.assert_close(direct.grad, whole.grad)


def test_where_no_slot_is_open_or_there_is_no_row_everything_still_has_its_shape() -> None:
    mask = torch.zeros(3, TREE_WIDTH, dtype=torch.bool)
    mask[:, Op.WAIT] = True
    values = torch.arange(3.0).unsqueeze(1).expand(3, TREE_WIDTH)
    for rows in (3, 0):
        for function in (tree_torch.maximum, tree_gradients.logsumexp):
            assert torch.equal(function(values[:rows], mask[:rows]), torch.arange(float(rows)))
        for function in (tree_torch.argmax, tree_torch.greedy):
            assert torch.equal(function(values[:rows], mask[:rows]), torch.zeros(rows, 8, dtype=torch.int8))


def test_a_row_that_allows_nothing_raises() -> None:
    mask = torch.zeros(2, TREE_WIDTH, dtype=torch.bool)
    mask[0, Op.WAIT] = True
    for function in (tree_torch.log_softmax, tree_torch.maximum, tree_gradients.logsumexp, tree_torch.argmax):
        with pytest.raises(MaskError, match="row 1"):
            function(torch.zeros(2, TREE_WIDTH), mask)
