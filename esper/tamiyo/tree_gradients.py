"""The two functions of the action tree that gradients pass in every step of a learner, with their exact gradients.

Autograd would record some thirty short operations for each and go through them again backwards; the gradient of
either is a product of softmaxes, which the forward pass has already computed.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper.leyline.actions import LEVERS, MAX_SLOTS, NUM_OPS, TREE_WIDTH, Op
from esper.tamiyo.tree_blocks import LEVER_BLOCK, MASKED, OPS, SLOTS, Kept, check_some, open_blocks, open_choices

_GERMINATE = int(Op.GERMINATE) - 1
_WIDEST = len(LEVER_BLOCK)
_NUM_CHOICES = 2 + len(LEVERS)

SMALLEST_EXPONENT = -80.0
"""What lies this far below the largest adds nothing in float32, and an exp that underflows takes ten times as long."""


def _entries_by_path() -> tuple[Tensor, NDArray[np.float32]]:
    """Return the alternatives of each choice below an op and slot, [paths, widest * 8], and 1 where there is one.

    What is not there is padded with entry 0.
    """
    entries = torch.full((NUM_OPS, MAX_SLOTS, _WIDEST, _NUM_CHOICES), TREE_WIDTH)
    entries[:, :, :NUM_OPS, 0] = OPS
    for op in range(1, NUM_OPS):
        entries[op, :, :MAX_SLOTS, 1] = SLOTS[:, op - 1]
    entries[int(Op.GERMINATE), :, :, 2:] = LEVER_BLOCK.transpose(0, 1)
    flat = entries.reshape(NUM_OPS * MAX_SLOTS, -1)
    there = flat < TREE_WIDTH
    return flat.masked_fill(~there, 0), there.numpy().astype(np.float32)


_ENTRIES, _THERE = _entries_by_path()
_READ = torch.from_numpy(_THERE.reshape(-1, _WIDEST, _NUM_CHOICES).max(axis=1))


def _exps(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest along dimension 0, and exp(values - largest), lifted to exp(SMALLEST_EXPONENT)."""
    largest = values.amax(dim=0)
    return largest, (values - largest).clamp_(min=SMALLEST_EXPONENT).exp_()


class _ActionLogProb(torch.autograd.Function):
    """log pi(a) = sum over the choices that a reads of x_chosen - log sum exp x;  d / dx = 1[chosen] - softmax(x)."""

    @staticmethod
    def forward(ctx: Any, logits_NT: Tensor, mask_NT: Tensor, actions_NA: Tensor) -> Tensor:
        check_some(mask_NT)
        num_rows = len(mask_NT)
        chosen = actions_NA.long()
        path = chosen[:, 0] * MAX_SLOTS + chosen[:, 1]
        rows = torch.arange(0, num_rows * TREE_WIDTH, TREE_WIDTH).unsqueeze(1)
        entries = (_ENTRIES.index_select(0, path) + rows).t().flatten()
        allowed = mask_NT.numpy().reshape(-1).take(entries.numpy()) * _THERE.take(path.numpy(), axis=0).T.reshape(-1)
        is_open = torch.from_numpy(allowed)
        alternatives = logits_NT.reshape(-1).index_select(0, entries).clamp_(min=MASKED) + (is_open - 1) * -MASKED
        alternatives = alternatives.view(_WIDEST, _NUM_CHOICES, num_rows)
        chosen = chosen.t().unsqueeze(0)
        largest, weights = _exps(alternatives)
        total = weights.sum(dim=0)
        terms = alternatives.gather(0, chosen).squeeze(0) - largest - total.log()
        result = (terms * _READ.index_select(0, path).t()).sum(dim=0)
        impossible = result < MASKED / 2
        ctx.save_for_backward(weights, total, is_open, entries, chosen, impossible)
        return result.masked_fill_(impossible, -torch.inf)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weights, total, is_open, entries, chosen, impossible = ctx.saved_tensors
        gradient_N = gradients[0].masked_fill(impossible, 0.0)
        below = (weights / total).neg_()
        below.scatter_add_(0, chosen, torch.ones_like(total).unsqueeze(0))
        below = (below * gradient_N).flatten() * is_open
        flat = below.new_zeros(len(gradient_N) * TREE_WIDTH).scatter_add_(0, entries, below)
        return flat.view(-1, TREE_WIDTH), None, None


def action_log_prob(logits_NT: Tensor, mask_NT: Tensor, actions_NA: Tensor) -> Tensor:
    """Return log pi(a) of canonical actions, [N], from masked logits; -inf, without gradient, of one not valid.

    Raises:
        MaskError: A row allows no action.
    """
    return cast(Tensor, _ActionLogProb.apply(logits_NT, mask_NT, actions_NA))  # type: ignore[no-untyped-call]


class _LogSumExp(torch.autograd.Function):
    """log sum over the valid leaves of exp(value);  d / dx = the probability that a softmax over leaves passes x."""

    @staticmethod
    def forward(ctx: Any, values_NT: Tensor, mask_NT: Tensor) -> Tensor:
        choices = open_choices(mask_NT)
        op, slot, lever = open_blocks(values_NT, choices)
        lever_sum, lever_weights = _sum_and_weights(lever)
        slot[:, _GERMINATE].index_add_(0, choices.kept.places, lever_sum.sum(dim=1))
        slot_sum, slot_weights = _sum_and_weights(slot)
        op[1:] += slot_sum
        result, op_weights = _sum_and_weights(op)
        ctx.save_for_backward(choices.open_KN, op_weights, slot_weights, lever_weights)
        ctx.kept = choices.kept
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        open_KN, op, slot, lever = ctx.saved_tensors
        kept: Kept = ctx.kept
        op = op * gradients[0]
        slot = slot * op[1:]
        lever = lever * slot[:, _GERMINATE].index_select(0, kept.places).unsqueeze(1)
        kept_KN = torch.cat([op, slot.flatten(0, 1), lever.flatten(0, 2)]) * open_KN
        return nn.functional.pad(kept_KN, (0, 0, 0, 1)).index_select(0, kept.inverse).t(), None


def _sum_and_weights(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum exp along dimension 0, and the softmax along it."""
    largest, weights = _exps(values)
    total = weights.sum(dim=0)
    return largest + total.log(), weights.div_(total)


def logsumexp(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return logsumexp over valid actions of the additive value, [N].

    Raises:
        MaskError: A row allows no action.
    """
    return cast(Tensor, _LogSumExp.apply(values_NT, mask_NT))  # type: ignore[no-untyped-call]
