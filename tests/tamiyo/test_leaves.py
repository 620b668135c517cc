"""Atomic networks: what they sum, choose and act by equals the enumeration of their actions."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from esper.leyline import tree
from esper.leyline.actions import LEVERS, TREE_WIDTH, Op, lever_slice, slot_slice
from esper.leyline.errors import MaskError, SpecError
from esper.leyline.keys import numpy_generator
from esper.tamiyo import tree_torch
from esper.tamiyo.leaves import Leaves, leaves_of
from esper.tamiyo.networks import NetworkSpec, TreeNet

ROWS = 12


def small_masks(num: int = ROWS) -> np.ndarray:
    """Two slots, three blueprints, two tempos: 1 + 12 + 6 leaves, each row a random part of them."""
    rng = numpy_generator("test-leaves", 0)
    mask = np.zeros((num, TREE_WIDTH), dtype=bool)
    mask[:, Op.WAIT] = True
    for slot in range(2):
        for lever in range(len(LEVERS)):
            part = lever_slice(slot, lever)
            mask[:, part.start] = True
            if lever in (0, 2):
                mask[:, part.start + 1 : part.start + 2 + (lever == 0)] = rng.random((num, 1 + (lever == 0))) < 0.5
    for op in list(Op)[1:]:
        mask[:, slot_slice(op)][:, :2] = rng.random((num, 2)) < 0.6
        mask[:, op] = mask[:, slot_slice(op)].any(axis=1)
    return mask


@pytest.fixture
def case() -> tuple[Leaves, torch.Tensor, torch.Tensor]:
    mask = small_masks()
    actions = leaves_of(mask)
    assert len(actions) == 1 + 12 + 6
    leaves = Leaves(len(actions))
    leaves.fill(actions)
    entries = 3 * torch.randn(ROWS, len(actions), generator=torch.Generator().manual_seed(0))
    return leaves, entries, torch.from_numpy(mask)


def brute(leaves: Leaves, entries: torch.Tensor, mask: torch.Tensor):
    """For each row its valid actions and their entries."""
    known = [tuple(row) for row in leaves.actions.tolist()]
    for row in range(len(mask)):
        valid = tree.enumerate_actions(mask[row].numpy())
        yield valid, np.array([entries[row, known.index(tuple(action))].item() for action in valid.tolist()])


def test_choices_sums_and_probabilities_equal_the_enumeration(case) -> None:
    leaves, entries, mask = case
    uniform = tree_torch.log_softmax(torch.zeros(ROWS, TREE_WIDTH), mask)
    best, total = leaves.argmax(entries, mask), leaves.log_sum(entries, mask, None)
    weighted = leaves.log_sum(entries, mask, uniform)
    for row, (valid, values) in enumerate(brute(leaves, entries, mask)):
        assert best[row].tolist() == valid[values.argmax()].tolist()
        assert total[row].item() == pytest.approx(np.logaddexp.reduce(values), abs=1e-5)
        rho = tree_torch.log_prob(uniform[row].expand(len(valid), -1), torch.from_numpy(valid)).numpy()
        assert weighted[row].item() == pytest.approx(np.logaddexp.reduce(values + rho), abs=1e-5)
        logp = leaves.log_prob(
            entries[row].expand(len(valid), -1), mask[row].expand(len(valid), -1), torch.from_numpy(valid)
        )
        assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_tree_acts_by_the_best_leaf_and_by_exact_marginals(case) -> None:
    leaves, entries, mask = case
    greedy = tree_torch.greedy(leaves.best_below(entries, mask), mask)
    assert torch.equal(greedy, leaves.argmax(entries, mask))
    logp = tree_torch.log_softmax(leaves.log_marginals(entries, mask), mask)
    for row, (valid, values) in enumerate(brute(leaves, entries, mask)):
        p = np.exp(values - np.logaddexp.reduce(values))
        for op in range(5):
            share = p[valid[:, 0] == op].sum()
            assert logp[row, op].exp().item() == pytest.approx(share, abs=1e-5)
            for slot in range(2) if op else ():
                here = (valid[:, 0] == op) & (valid[:, 1] == slot)
                if here.any():
                    assert logp[row, slot_slice(op)][slot].exp().item() == pytest.approx(
                        p[here].sum() / share, abs=1e-4
                    )


def test_an_additive_list_sums_paths_and_its_prior_is_uniform_over_what_is_listed(case) -> None:
    leaves, _, mask = case
    kept = leaves.actions.numpy()[[0, 1, 4, 9, 13, 14, 17]]
    some = Leaves(len(kept))
    some.fill(kept)
    entries = torch.randn(ROWS, TREE_WIDTH, generator=torch.Generator().manual_seed(1))
    for row in range(ROWS):
        at = entries[row].expand(len(kept), -1)
        torch.testing.assert_close(some.sums(entries)[row], tree_torch.path_sum(at, some.actions))
    uniform = tree_torch.log_softmax(torch.zeros(ROWS, TREE_WIDTH), mask)
    weighted = some.log_sum(torch.zeros(ROWS, len(kept)), mask, uniform)
    for row in range(ROWS):
        valid = some.valid(mask)[row].numpy()
        places = {tuple(action[:2]) for action in kept[valid]}
        share = 0.0
        for op, slot in places:
            of_op = uniform[row, op].exp().item()
            share += of_op * (uniform[row, slot_slice(op)][slot].exp().item() if op else 1.0)
        assert weighted[row].exp().item() == pytest.approx(share, abs=1e-5)


def test_a_copy_that_loads_another_list_sums_by_that_list(case) -> None:
    leaves, _, _ = case
    first, second = Leaves(3), Leaves(3)
    first.fill(leaves.actions.numpy()[:3])
    second.fill(leaves.actions.numpy()[5:8])
    copied = deepcopy(first)
    copied.load_state_dict(second.state_dict())
    entries = torch.randn(ROWS, TREE_WIDTH, generator=torch.Generator().manual_seed(2))
    assert torch.equal(copied.sums(entries), second.sums(entries))
    assert not torch.equal(first.sums(entries), second.sums(entries))


def test_gradients_are_finite_and_zero_for_leaves_that_are_not_valid(case) -> None:
    leaves, entries, mask = case
    entries.requires_grad_()
    actions = leaves.argmax(entries, mask)
    (leaves.log_prob(entries, mask, actions) + leaves.log_sum(entries, mask, None)).sum().backward()
    assert torch.isfinite(entries.grad).all()
    assert (entries.grad[~leaves.valid(mask)] == 0).all()


def test_too_many_leaves_unknown_actions_and_rows_that_allow_nothing_are_refused(case) -> None:
    leaves, entries, mask = case
    full = np.ones((1, TREE_WIDTH), dtype=bool)
    with pytest.raises(SpecError, match="23,059 actions"):
        leaves_of(full)
    with pytest.raises(MaskError, match="not among the 19"):
        leaves.index(torch.tensor([[Op.PRUNE, 5, 0, 0, 0, 0, 0, 0]], dtype=torch.int8))
    mask[3] = False
    with pytest.raises(MaskError, match="row 3"):
        leaves.argmax(entries, mask)
    with pytest.raises(SpecError, match="without a list"):
        TreeNet(NetworkSpec(form="atomic"))
