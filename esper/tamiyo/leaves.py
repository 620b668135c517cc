"""Whole actions as a finite list: every leaf of the tree (form `atomic`) or those of the data (form `listed`).

An atomic network has an entry for each, and shares nothing between two actions: the counterpart of the additive form,
as an ablation. A listed one has the entries of the additive form, of which an action's value is the sum, and may choose
what is listed alone. Shape suffix L: the leaves.
A policy over leaves has no exact factors op, slot, levers; where one acts or is measured on the tree, its exact
marginals stand for it: pi(op), pi(slot | op), and each lever's given the slot.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from esper.leyline import tree
from esper.leyline.actions import (
    ACTION_WIDTH,
    LEVERS,
    TREE_WIDTH,
    Actions,
    Bools,
    Op,
    lever_slice,
    slot_slice,
)
from esper.leyline.errors import MaskError, SpecError
from esper.tamiyo import tree_blocks, tree_torch

MAX_LEAVES = 4096


def leaves_of(mask_NT: Bools) -> Actions:
    """Return every action whose choices each are valid in some row, int8 [L, A].

    Raises:
        SpecError: More than MAX_LEAVES.
    """
    union: Bools = np.asarray(mask_NT.any(axis=0))
    num = 1 + sum(np.count_nonzero(union[slot_slice(op)]) for op in list(Op)[2:])
    for slot in np.flatnonzero(union[slot_slice(Op.GERMINATE)]):
        num += math.prod(np.count_nonzero(union[lever_slice(int(slot), lever)]) for lever in range(len(LEVERS)))
    if num > MAX_LEAVES:
        raise SpecError(
            f"an atomic network of {num:,} actions\n  expected: at most {MAX_LEAVES:,}; "
            'use `form = "additive"`, or an environment that offers fewer levers'
        )
    return tree.enumerate_actions(union)


class Leaves(nn.Module):
    """The list, kept with the weights, and the operations on entries [N, L] that the tree has on its own."""

    actions: Tensor
    passes_TL: Tensor

    def __init__(self, num: int) -> None:
        """Room for `num` leaves; SpecError where there is none."""
        super().__init__()
        if num < 1:
            raise SpecError("a network of whole actions without a list of them\n  expected: num_leaves of 1 or more")
        self.register_buffer("actions", torch.zeros(num, ACTION_WIDTH, dtype=torch.int8))
        self.register_buffer("passes_TL", torch.zeros(TREE_WIDTH, num), persistent=False)
        self.register_load_state_dict_post_hook(lambda leaves, _: leaves._note_paths())  # type: ignore[no-untyped-call]
        self._note_paths()

    def fill(self, actions_LA: Actions) -> None:
        """Set the list."""
        self.actions.copy_(torch.from_numpy(np.ascontiguousarray(actions_LA)))
        self._note_paths()

    def _note_paths(self) -> None:
        """Note which entries each leaf passes: 1 there, else 0."""
        entries, read = self._paths()
        self.passes_TL.zero_().t().scatter_add_(1, entries, read.to(self.passes_TL.dtype))

    def sums(self, entries_NT: Tensor) -> Tensor:
        """Return the additive value of each leaf, [N, L]."""
        return entries_NT @ self.passes_TL

    def index(self, actions_NA: Tensor) -> Tensor:
        """Return the place of canonical actions in the list, int64 [N]; MaskError where one is not in it."""
        same = (actions_NA.unsqueeze(1) == self.actions).all(dim=2)
        if not bool(same.any(dim=1).all()):
            row = int(torch.nonzero(~same.any(dim=1))[0])
            raise MaskError(
                f"action {actions_NA[row].tolist()} is not among the {len(self.actions)} of this network\n"
                "  an atomic network knows only the actions that its training data allowed"
            )
        return same.to(torch.int8).argmax(dim=1)

    def _paths(self) -> tuple[Tensor, Tensor]:
        return tree_torch.entries_of(self.actions)

    def valid(self, mask_NT: Tensor) -> Tensor:
        """Return which leaves the masks allow, bool [N, L]; MaskError where a row allows none of them."""
        tree_blocks.check_some(mask_NT)
        allowed = mask_NT.to(self.passes_TL.dtype) @ self.passes_TL == self.passes_TL.sum(dim=0)
        if not bool(allowed.any(dim=1).all()):
            raise MaskError("a row allows none of the network's actions\n  expected: WAIT is always valid")
        return allowed

    def _masked(self, entries_NL: Tensor, mask_NT: Tensor) -> Tensor:
        return entries_NL.masked_fill(~self.valid(mask_NT), tree_blocks.MASKED)

    def of_action(self, entries_NL: Tensor, actions_NA: Tensor) -> Tensor:
        """Return the entry of each canonical action, [N]."""
        return entries_NL.gather(1, self.index(actions_NA).unsqueeze(1)).squeeze(1)

    def argmax(self, entries_NL: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the valid action of the greatest entry, int8 [N, A]."""
        return self.actions[self._masked(entries_NL, mask_NT).argmax(dim=1)]

    def at_argmax(self, entries_NL: Tensor, chosen_by_NL: Tensor, mask_NT: Tensor) -> Tensor:
        """Return the entry of the valid action that is greatest by `chosen_by_NL`, [N]."""
        best = self._masked(chosen_by_NL, mask_NT).argmax(dim=1)
        return entries_NL.gather(1, best.unsqueeze(1)).squeeze(1)

    def log_sum(self, entries_NL: Tensor, mask_NT: Tensor, prior_NT: Tensor | None) -> Tensor:
        """Return log sum over valid leaves of rho(a) exp of the entry, [N]; see `TreeNet.log_sum`."""
        valid = self.valid(mask_NT)
        masked = entries_NL.masked_fill(~valid, tree_blocks.MASKED)
        if prior_NT is not None:
            entries, read = self._paths()
            log_rho = prior_NT[:, entries[:, :2]].masked_fill(~read[:, :2], 0.0).sum(dim=2)
            beside_NL = valid.to(entries_NL.dtype) @ self._same_op_and_slot()
            masked = masked + (log_rho - beside_NL.clamp(min=1.0).log()).clamp(min=tree_blocks.MASKED)
        return masked.logsumexp(dim=1)

    def _same_op_and_slot(self) -> Tensor:
        first = self.actions[:, :2]
        return (first.unsqueeze(1) == first).all(dim=2).to(self.passes_TL.dtype)

    def log_prob(self, entries_NL: Tensor, mask_NT: Tensor, actions_NA: Tensor) -> Tensor:
        """Return the log-probability of canonical actions under the softmax over valid leaves, [N]."""
        return self.of_action(torch.log_softmax(self._masked(entries_NL, mask_NT), dim=1), actions_NA)

    def best_below(self, entries_NL: Tensor, mask_NT: Tensor) -> Tensor:
        """Return for each choice the greatest entry among the valid leaves that pass it, [N, TREE_WIDTH]."""
        masked = self._masked(entries_NL, mask_NT)
        out = masked.new_full((len(masked), TREE_WIDTH + 1), tree_blocks.MASKED)
        for place in self._columns():
            out = out.scatter_reduce(1, place.expand(len(masked), -1), masked, "amax")
        return out[:, :TREE_WIDTH].masked_fill(~mask_NT, 0.0)

    def log_marginals(self, entries_NL: Tensor, mask_NT: Tensor) -> Tensor:
        """Return log of the probability that the softmax over leaves passes each choice, float32 [N, TREE_WIDTH]."""
        masked = self._masked(entries_NL, mask_NT)
        probability = torch.softmax(masked.double(), dim=1)
        out = probability.new_zeros((len(masked), TREE_WIDTH + 1))
        for place in self._columns():
            out = out.scatter_add(1, place.expand(len(masked), -1), probability)
        return out[:, :TREE_WIDTH].clamp(min=torch.finfo(torch.float64).tiny).log().float().masked_fill(~mask_NT, 0.0)

    def _columns(self) -> list[Tensor]:
        """For each column of an action the choice that every leaf passes, int64 [L]; TREE_WIDTH where it reads none."""
        entries, read = self._paths()
        return list(entries.masked_fill(~read, TREE_WIDTH).unbind(dim=1))
