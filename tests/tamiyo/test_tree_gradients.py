"""The gradients that the tree's own functions state are the true ones, whatever is masked."""

import numpy as np
import pytest
import torch
from test_tree_torch import case

from esper.leyline import tree
from esper.leyline.actions import TREE_WIDTH, Op
from esper.leyline.errors import MaskError
from esper.tamiyo import tree_gradients, tree_torch


@pytest.mark.parametrize("seed", range(4))
def test_both_gradients_are_those_of_finite_differences(seed: int) -> None:
    _, _, values, mask = case(seed)
    mask[0, 1:] = False
    logp = tree_torch.log_softmax(values, mask)
    actions = tree_torch.sample(logp, mask, torch.full((len(mask), 8), 0.6))
    leaf = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: tree_gradients.logsumexp(v, mask), leaf)
    assert torch.autograd.gradcheck(lambda v: tree_gradients.action_log_prob(v, mask, actions), leaf)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_the_sum_over_leaves_is_how_likely_each_entry_is_passed(seed: int) -> None:
    _, mask, values, mask_t = case(seed)
    leaf = values.clone().requires_grad_()
    tree_gradients.logsumexp(leaf, mask_t).sum().backward()
    for row in range(len(mask)):
        actions = torch.tensor(tree.enumerate_actions(mask[row]))
        at = values[row].expand(len(actions), -1)
        probability = torch.softmax(tree_torch.path_sum(at, actions), dim=0)
        entries, read = tree_torch.entries_of(actions)
        passed = torch.zeros(TREE_WIDTH, dtype=torch.float64)
        passed.index_add_(0, entries[read], probability.unsqueeze(1).expand(-1, 8)[read])
        torch.testing.assert_close(leaf.grad[row], passed)


def test_an_action_that_is_not_valid_has_no_gradient_and_does_not_disturb_the_others() -> None:
    _, _, values, mask = case(1)
    mask[0, 1:] = False
    actions = torch.zeros(len(mask), 8, dtype=torch.int8)
    actions[0, 0] = int(Op.PRUNE)
    leaf = values.clone().requires_grad_()
    found = tree_gradients.action_log_prob(leaf, mask, actions)
    assert found[0] == -torch.inf
    assert torch.isfinite(found[1:]).all()
    found.sum().backward()
    assert (leaf.grad[0] == 0).all()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[1:, Op.WAIT] > 0).any()


def test_entries_of_minus_infinity_where_nothing_is_allowed_count_for_nothing() -> None:
    _, _, values, mask = case(2)
    unlikely = values.masked_fill(~mask, -torch.inf)
    for function in (tree_gradients.logsumexp, tree_torch.maximum):
        torch.testing.assert_close(function(unlikely, mask), function(values, mask))
    assert torch.equal(tree_torch.argmax(unlikely, mask), tree_torch.argmax(values, mask))
    torch.testing.assert_close(
        tree_torch.at_argmax(unlikely, values, mask), tree_torch.maximum(values, mask), rtol=0, atol=0
    )


def test_a_row_that_allows_nothing_is_refused_by_both() -> None:
    mask = torch.zeros(2, TREE_WIDTH, dtype=torch.bool)
    mask[0, Op.WAIT] = True
    actions = torch.from_numpy(np.zeros((2, 8), dtype=np.int8))
    with pytest.raises(MaskError, match="row 1"):
        tree_gradients.action_log_prob(torch.zeros(2, TREE_WIDTH), mask, actions)
    with pytest.raises(MaskError, match="row 1"):
        tree_gradients.logsumexp(torch.zeros(2, TREE_WIDTH), mask)
