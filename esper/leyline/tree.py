"""Exact operations on the action tree in NumPy: no enumeration of the leaves.

For additive values Q(s, a) = U_op + U_slot + sum of U_lever, an operation f (max, logsumexp) over all valid leaves is

    Z_slot(op, slot) = U_slot + sum_levers f(U_lever | slot)      (levers under GERMINATE alone)
    Z_op(op)         = U_op + f_slot Z_slot
    result           = f_op Z_op

and a policy factorises as log pi(a) = log pi(op) + log pi(slot | op) + sum log pi(lever | slot).
Shape suffixes as in `actions`. All functions raise MaskError on an all-false row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from esper.leyline.actions import (
    ACTION_WIDTH,
    LEVER_SIZES,
    LEVERS,
    MAX_SLOTS,
    NUM_OPS,
    OP_SLICE,
    Actions,
    Bools,
    Op,
    check_mask,
    entries_of,
    is_valid,
    lever_slice,
    slot_slice,
)
from esper.leyline.errors import MaskError

Floats = NDArray[np.float64]
Reduce = Callable[[Floats], Floats]

NUM_UNIFORMS = 1 + ACTION_WIDTH
"""Uniform draws that one decision needs: an exploration coin, then one per column of the action."""


def _max(values: Floats) -> Floats:
    result: Floats = values.max(axis=-1)
    return result


def _logsumexp(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(values, axis=-1))


def groups() -> list[slice]:
    """Return the slices of the tree that each hold one categorical choice: op, slots by op, levers by slot."""
    slots = [slot_slice(op) for op in range(1, NUM_OPS)]
    levers = [lever_slice(slot, lever) for slot in range(MAX_SLOTS) for lever in range(len(LEVERS))]
    return [OP_SLICE, *slots, *levers]


def log_softmax(logits_NT: NDArray[np.floating], mask_NT: Bools) -> Floats:
    """Return masked log-probabilities of each choice within its group, float64 [N, T]; -inf where masked."""
    check_mask(mask_NT)
    masked = np.where(mask_NT, logits_NT.astype(np.float64), -np.inf)
    out = np.full(masked.shape, -np.inf)
    for group in groups():
        part = masked[:, group]
        live = mask_NT[:, group].any(axis=1)
        out[live, group] = part[live] - _logsumexp(part[live])[:, None]
    return out


def log_prob(logp_NT: Floats, actions_NA: NDArray[np.integer], mask_NT: Bools) -> Floats:
    """Return log pi(a) of each action, float64 [N], from the output of `log_softmax`; -inf where not valid."""
    entries, read = entries_of(actions_NA)
    parts = np.where(read, np.take_along_axis(logp_NT, entries, axis=1), 0.0)
    return np.where(is_valid(actions_NA, mask_NT), parts.sum(axis=1), -np.inf)


def uniform_logits(num_rows: int) -> Floats:
    """Return the logits of the hierarchical uniform policy: uniform over valid ops, then slots, then each lever."""
    return np.zeros((num_rows, groups()[-1].stop))


def _slot_values(values: Floats, op: Op, of_lever: Callable[[slice], Floats]) -> Floats:
    """The value of each slot under an op, [N, S]: its own, and under GERMINATE what its levers come to."""
    z_slot = values[:, slot_slice(op)].copy()
    if op is Op.GERMINATE:
        for slot in range(MAX_SLOTS):
            for lever in range(len(LEVERS)):
                z_slot[:, slot] += of_lever(lever_slice(slot, lever))
    return z_slot


def tree_reduce(values_NT: NDArray[np.floating], mask_NT: Bools, reduce: Reduce) -> Floats:
    """Return the reduction of additive leaf values over the valid leaves, float64 [N]."""
    check_mask(mask_NT)
    values = np.where(mask_NT, values_NT.astype(np.float64), -np.inf)
    z_op = values[:, OP_SLICE].copy()
    for op in list(Op)[1:]:
        z_op[:, op] += reduce(_slot_values(values, op, lambda part: reduce(values[:, part])))
    return reduce(np.where(np.isnan(z_op), -np.inf, z_op))


def tree_max(values_NT: NDArray[np.floating], mask_NT: Bools) -> Floats:
    """Return max over valid actions of the additive value, float64 [N]."""
    return tree_reduce(values_NT, mask_NT, _max)


def tree_logsumexp(values_NT: NDArray[np.floating], mask_NT: Bools) -> Floats:
    """Return logsumexp over valid actions of the additive value, float64 [N]."""
    return tree_reduce(values_NT, mask_NT, _logsumexp)


def tree_argmax(values_NT: NDArray[np.floating], mask_NT: Bools) -> Actions:
    """Return the valid action with the greatest additive value, int8 [N, A]."""
    check_mask(mask_NT)
    values = np.where(mask_NT, values_NT.astype(np.float64), -np.inf)
    num = len(values)
    z_op = values[:, OP_SLICE].copy()
    best_slot = np.zeros((num, NUM_OPS), dtype=np.int64)
    for op in list(Op)[1:]:
        z_slot = _slot_values(values, op, lambda part: _max(values[:, part]))
        best_slot[:, op] = z_slot.argmax(axis=1)
        z_op[:, op] += z_slot.max(axis=1)
    actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
    actions[:, 0] = z_op.argmax(axis=1)
    actions[:, 1] = best_slot[np.arange(num), actions[:, 0]]
    for slot in range(MAX_SLOTS):
        rows = (actions[:, 0] == Op.GERMINATE) & (actions[:, 1] == slot)
        for lever in range(len(LEVERS)):
            actions[rows, 2 + lever] = values[rows, lever_slice(slot, lever)].argmax(axis=1)
    return actions


def expectation(logp_NT: Floats, values_NT: NDArray[np.floating], mask_NT: Bools) -> Floats:
    """Return E_pi of additive leaf values, float64 [N]."""
    probs = np.exp(logp_NT)
    values = np.where(mask_NT, values_NT.astype(np.float64), 0.0)
    z_op = values[:, OP_SLICE].copy()
    for op in list(Op)[1:]:
        z_slot = _slot_values(values, op, lambda part: (probs[:, part] * values[:, part]).sum(axis=1))
        z_op[:, op] += (probs[:, slot_slice(op)] * z_slot).sum(axis=1)
    result: Floats = (probs[:, OP_SLICE] * z_op).sum(axis=1)
    return result


def kl_divergence(logp_NT: Floats, other_logp_NT: Floats, mask_NT: Bools) -> Floats:
    """Return KL(pi || other) of two masked tree policies, float64 [N] (chain rule, exact)."""
    difference = np.zeros_like(logp_NT)
    difference[mask_NT] = logp_NT[mask_NT] - other_logp_NT[mask_NT]
    return expectation(logp_NT, difference, mask_NT)


def entropy(logp_NT: Floats, mask_NT: Bools) -> Floats:
    """Return the joint entropy of a masked tree policy in nats, float64 [N]."""
    return expectation(logp_NT, np.where(mask_NT, -np.where(mask_NT, logp_NT, 0.0), 0.0), mask_NT)


def sample(logp_NT: Floats, mask_NT: Bools, uniforms_NA: NDArray[np.floating]) -> Actions:
    """Return one sampled action per row, int8 [N, A].

    Args:
        logp_NT: Output of `log_softmax`.
        mask_NT: The same mask.
        uniforms_NA: Uniform draws in [0, 1), float [N, A], one per column; inverse-CDF per choice.
    """
    num = len(logp_NT)
    probs = np.exp(logp_NT)
    actions = np.zeros((num, ACTION_WIDTH), dtype=np.int8)
    actions[:, 0] = _draw(probs[:, OP_SLICE], mask_NT[:, OP_SLICE], uniforms_NA[:, 0])
    for op in list(Op)[1:]:
        rows = np.flatnonzero(actions[:, 0] == op)
        if rows.size:
            part = slot_slice(op)
            actions[rows, 1] = _draw(probs[rows, part], mask_NT[rows, part], uniforms_NA[rows, 1])
    for slot in range(MAX_SLOTS):
        rows = np.flatnonzero((actions[:, 0] == Op.GERMINATE) & (actions[:, 1] == slot))
        if rows.size:
            for lever in range(len(LEVERS)):
                part = lever_slice(slot, lever)
                actions[rows, 2 + lever] = _draw(probs[rows, part], mask_NT[rows, part], uniforms_NA[rows, 2 + lever])
    return actions


def _draw(probs: Floats, mask: Bools, uniforms: NDArray[np.floating]) -> NDArray[np.int8]:
    cumulative = probs.cumsum(axis=1)
    index = (uniforms[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return np.asarray(np.minimum(index, last), dtype=np.int8)


def enumerate_actions(mask_T: Bools) -> Actions:
    """Return every valid action of one state, int8 [leaves, A]: the brute force that tests compare with."""
    if not mask_T.any():
        raise MaskError("the mask allows no action\n  expected: WAIT is always valid")
    rows: list[tuple[int, ...]] = []
    for op in np.flatnonzero(mask_T[OP_SLICE]):
        if op == Op.WAIT:
            rows.append((0,) * ACTION_WIDTH)
            continue
        for slot in np.flatnonzero(mask_T[slot_slice(int(op))]):
            if op != Op.GERMINATE:
                rows.append((int(op), int(slot), *(0,) * len(LEVER_SIZES)))
                continue
            choices = [np.flatnonzero(mask_T[lever_slice(int(slot), lever)]) for lever in range(len(LEVERS))]
            rows.extend((int(op), int(slot), *(int(c) for c in combo)) for combo in itertools.product(*choices))
    return np.array(rows, dtype=np.int8)
