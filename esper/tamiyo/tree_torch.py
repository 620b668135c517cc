"""Exact operations on the action tree in torch: the twins of `esper.leyline.tree` that a gradient can pass.

All take flat tensors of TREE_WIDTH entries and work on the blocks of `tree_blocks`, so that no operation loops over
choices (a softmax over a short last dimension is ten times slower than one over dimension 1).

Masked entries are filled with a large finite number before anything is computed, so that a group with every choice
masked has a gradient of exactly 0, never NaN. Shape suffixes as in `esper.leyline.actions`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from esper.leyline.actions import ACTION_WIDTH, LEVERS, MAX_SLOTS, NUM_OPS, Op
from esper.leyline.actions import entries_of as paths_of
from esper.tamiyo.tree_blocks import (
    MASKED,
    Kept,
    Open,
    Parts,
    check_some,
    join,
    open_blocks,
    open_choices,
    split,
)

_GERMINATE = int(Op.GERMINATE) - 1
_GERMINATES = torch.tensor([_GERMINATE])

_FIRST = np.zeros((NUM_OPS * MAX_SLOTS, ACTION_WIDTH), dtype=np.int8)
_FIRST[:, 0], _FIRST[:, 1] = np.divmod(np.arange(len(_FIRST)), MAX_SLOTS)
_PATHS, _READ = (torch.from_numpy(part) for part in paths_of(_FIRST))
"""By op and slot the entries that an action with the first value of every lever passes, and which it reads."""


def _masked(values_NT: Tensor, mask_NT: Tensor) -> Parts:
    check_some(mask_NT)
    return split(values_NT.masked_fill(~mask_NT, MASKED), MASKED)


def _zeroed(values_NT: Tensor, mask_NT: Tensor) -> Parts:
    return split(values_NT.masked_fill(~mask_NT, 0.0), 0.0)


def _under(slot_NSO: Tensor, germinate_NS: Tensor) -> Tensor:
    """Add what lies below a slot choice, which only GERMINATE has."""
    return slot_NSO + nn.functional.pad(germinate_NS.unsqueeze(2), (0, NUM_OPS - 2))


def _below_op(op_NO: Tensor, slots_N4: Tensor) -> Tensor:
    """Add what lies below an op, which WAIT does not have."""
    return op_NO + nn.functional.pad(slots_N4, (1, 0))


def log_softmax(logits_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return masked log-probabilities of each choice within its group, [N, T]; -inf where masked.

    Raises:
        MaskError: A row allows no action.
    """
    parts = _masked(logits_NT, mask_NT)
    flat = join(Parts(*(torch.log_softmax(part, dim=1) for part in parts)))
    return flat.masked_fill(~mask_NT, -torch.inf)


def entries_of(actions_NA: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that canonical actions pass, int64 [N, 8], and which of them they read, bool [N, 8]."""
    act = actions_NA.long()
    path = act[:, 0] * MAX_SLOTS + act[:, 1]
    entries, read = _PATHS.index_select(0, path), _READ.index_select(0, path)
    entries[:, 2:] += act[:, 2:]
    return entries, read


def path_sum(values_NT: Tensor, actions_NA: Tensor) -> Tensor:
    """Return the sum of the entries that each canonical action passes, [N]: Q(s, a), or log pi(a) of log-probabilities.

    A log-probability of an action that is not valid is -inf.
    """
    entries, read = entries_of(actions_NA)
    return values_NT.gather(1, entries).masked_fill(~read, 0.0).sum(dim=1)


def log_prob(logp_NT: Tensor, actions_NA: Tensor) -> Tensor:
    """Return log pi(a) of canonical actions, [N], from the output of `log_softmax`."""
    return path_sum(logp_NT, actions_NA)


def maximum(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return max over valid actions of the additive value, [N]."""
    choices = open_choices(mask_NT)
    return _with_best_levers(open_blocks(values_NT, choices), choices.kept).op.amax(dim=0)


def _with_best_levers(opened: Open, kept: Kept) -> Open:
    """Return the blocks with the best that lies below it added to every op and slot choice."""
    op, slot, lever = opened
    if len(kept.places):
        below_GN = lever.amax(dim=0).sum(dim=1)
        slot = slot.index_put((kept.places, _GERMINATES.expand(len(kept.places))), below_GN, accumulate=True)
    return Open(op + nn.functional.pad(slot.amax(dim=0), (0, 0, 1, 0)), slot, lever)


def best_below(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return for each entry the greatest additive value among the valid leaves at or below it, [N, T].

    Read as logits they make choosing step by step the same as choosing the best leaf, which raw entries do not.
    """
    op, slot, lever = _masked(values_NT, mask_NT)
    slot = _under(slot, lever.amax(dim=1).sum(dim=-1))
    flat = join(Parts(_below_op(op, slot.amax(dim=1)), slot, lever))
    return flat.masked_fill(~mask_NT, 0.0)


def greedy(logits_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return the action of the most probable op, then slot, then each lever, int8 [N, A].

    This is not the most probable leaf: a germination divides its probability among thousands of leaves, WAIT has one.
    """
    choices = open_choices(mask_NT)
    return _greedy(open_blocks(logits_NT, choices), choices.kept)


def _greedy(opened: Open, kept: Kept) -> Tensor:
    op_N = _largest(opened.op)
    place_N = _slot_of(op_N, _largest(opened.slot).t())
    slot_N = kept.slots[place_N] * (op_N != Op.WAIT)
    if not len(kept.places):
        return _with_levers(op_N, slot_N, op_N.new_zeros((len(op_N), len(LEVERS))))
    lever = torch.zeros(len(kept.slots), dtype=torch.int64)
    lever[kept.places] = torch.arange(len(kept.places))
    lever_NVL = opened.lever[:, lever[place_N], :, torch.arange(len(op_N))]
    return _with_levers(op_N, slot_N, _largest(lever_NVL.transpose(0, 1)))


def _largest(values: Tensor) -> Tensor:
    """Return `values.argmax(dim=0)`, whose kernel is up to fifteen times slower than that of `max`."""
    return values.max(dim=0).indices


def argmax(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return the valid action with the greatest additive value, int8 [N, A]."""
    choices = open_choices(mask_NT)
    return _greedy(_with_best_levers(open_blocks(values_NT, choices), choices.kept), choices.kept)


@torch.no_grad()
def at_argmax(values_NT: Tensor, chosen_by_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return the additive value of the valid action that is greatest by `chosen_by_NT`, [N], without gradient."""
    choices = open_choices(mask_NT)
    op, slot, lever = open_blocks(values_NT, choices)
    by_op, by_slot, by_lever = open_blocks(chosen_by_NT, choices)
    for slots, levers in zip((slot, by_slot), _at_largest(lever, by_lever)):
        slots[:, _GERMINATE].index_add_(0, choices.kept.places, levers.sum(dim=1))
    for ops, slots in zip((op, by_op), _at_largest(slot, by_slot)):
        ops[1:] += slots
    return _at_largest(op, by_op)[0]


def _at_largest(values: Tensor, chosen_by: Tensor) -> tuple[Tensor, Tensor]:
    """Return both along dimension 0 at the greatest entry of the second, the largest value where several are."""
    largest = chosen_by.amax(dim=0)
    return (values + (chosen_by < largest) * MASKED).amax(dim=0), largest


def sample(logp_NT: Tensor, mask_NT: Tensor, uniforms_NA: Tensor) -> Tensor:
    """Return actions drawn by inverse CDF, int8 [N, A]; one uniform in [0, 1) per column of the action."""
    probs = [part.exp() for part in _masked(logp_NT, mask_NT)]
    valid = _zeroed(mask_NT.to(logp_NT.dtype), mask_NT)
    draws = (uniforms_NA[:, :1], uniforms_NA[:, 1, None, None], uniforms_NA[:, None, None, 2:])
    return _assemble(*(_draw(p, v > 0, u) for p, v, u in zip(probs, valid, draws)))


def _draw(probs: Tensor, valid: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = probs.cumsum(dim=1)
    index = (uniforms * cumulative[:, -1:] >= cumulative).sum(dim=1)
    last = valid.shape[1] - 1 - valid.flip(1).to(torch.int8).argmax(dim=1)
    return torch.minimum(index, last)


def _slot_of(op_N: Tensor, slot_NO: Tensor) -> Tensor:
    """Return the slot of the chosen op, 0 under WAIT, from one slot for each other op."""
    return slot_NO.gather(1, (op_N - 1).clamp(min=0).unsqueeze(1)).squeeze(1) * (op_N != Op.WAIT)


def _with_levers(op_N: Tensor, slot_N: Tensor, lever_NL: Tensor) -> Tensor:
    levers = lever_NL * (op_N == Op.GERMINATE).unsqueeze(1)
    return torch.cat([op_N.unsqueeze(1), slot_N.unsqueeze(1), levers], dim=1).to(torch.int8)


def _assemble(op_N: Tensor, slot_NO: Tensor, lever_NSL: Tensor) -> Tensor:
    """Return the canonical actions of one chosen op, one slot for each op and the levers of each slot."""
    slot_N = _slot_of(op_N, slot_NO)
    return _with_levers(op_N, slot_N, lever_NSL[torch.arange(len(op_N)), slot_N])


def expectation(logp_NT: Tensor, values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return E_pi of additive leaf values, [N]."""
    probs = [part.exp() for part in _masked(logp_NT, mask_NT)]
    op, slot, lever = _zeroed(values_NT, mask_NT)
    slot = _under(slot, (probs[2] * lever).sum(dim=(1, 3)))
    return (probs[0] * _below_op(op, (probs[1] * slot).sum(dim=1))).sum(dim=1)


def entropy(logp_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return the joint entropy in nats, [N]."""
    return -expectation(logp_NT, logp_NT, mask_NT)


def kl_divergence(logp_NT: Tensor, other_logp_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return KL(pi || other), [N] (chain rule, exact)."""
    masked = ~mask_NT
    difference = logp_NT.masked_fill(masked, 0.0) - other_logp_NT.masked_fill(masked, 0.0)
    return expectation(logp_NT, difference, mask_NT)


def normalised_entropy(logp_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Return the entropy of each choice over log(number of valid values), weighted by how likely it is met, [N].

    The levers of a germination count as one choice (their mean). The weights carry no gradient: a bonus on this spreads
    every choice and does not reward meeting more of them. In [0, 3]; 0 for a choice with one valid value.
    """
    logp = _masked(logp_NT, mask_NT)
    valid = _zeroed(mask_NT.to(logp_NT.dtype), mask_NT)
    ratios = [_entropy_ratio(p, v) for p, v in zip(logp, valid)]
    reach_op = logp.op.exp().detach()[:, 1:]
    reach_slot = logp.slot.exp().detach()[:, :, _GERMINATE]
    levers = (reach_slot * ratios[2].mean(dim=-1)).sum(dim=-1)
    slots = (reach_op * ratios[1]).sum(dim=-1)
    return ratios[0] + slots + reach_op[:, _GERMINATE] * levers


def _entropy_ratio(logp: Tensor, valid: Tensor) -> Tensor:
    num = valid.sum(dim=1)
    terms = -(logp.exp() * logp.masked_fill(valid == 0, 0.0)).sum(dim=1)
    return torch.where(num > 1, terms / num.clamp(min=2).log(), torch.zeros_like(terms))
