"""Learned policies as controllers.

A policy acts step by step: the most probable op, then slot, then each lever (`tree_torch.greedy`), or one draw of each
when sampled. The most probable *leaf* would be another action: a germination divides its probability among thousands of
leaves. For a network of action values the two are one, since its logits are the best value below each alternative.

With an epsilon the behaviour is (1 - epsilon) * policy + epsilon * u, u the hierarchical uniform policy, executed
exactly and with the exact log-probability of the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from esper.leyline import tree
from esper.leyline.actions import NUM_OPS, OP_SLICE, TREE_WIDTH, WAIT_ROW, Actions, Bools, check_mask
from esper.leyline.protocols import BLOCK_ROWS, ActInputs, Carry, Decision, EpisodeStart
from esper.leyline.views import get_view
from esper.tamiyo import tree_torch
from esper.tamiyo.mixing import start_noise, uniform_log_probs
from esper.tamiyo.networks import TreeNet, single_thread

Floats = NDArray[np.float64]


class LearnedController:
    """A tree network that acts; the result of a row depends on that row alone, bit for bit."""

    def __init__(self, network: TreeNet, *, name: str, sampled: bool) -> None:
        self.name = name
        self.network = network.eval()
        self.sampled = sampled
        self._view = get_view(network.spec.view)

    def start(self, episodes: Sequence[EpisodeStart]) -> Carry:
        """Return the memory of new episodes: their epsilon and temperature, and zeros for a recurrent trunk.

        Raises:
            SpecError: An epsilon or a temperature is out of range.
        """
        carry = start_noise(episodes)
        if self.network.spec.trunk == "gru":
            carry["memory"] = np.zeros((len(episodes), self.network.spec.hidden), dtype=np.float32)
        return carry

    def act(self, inputs: ActInputs, carry: Carry) -> Decision:
        """Return one decision per row; MaskError where a mask allows nothing or is inconsistent."""
        mask = inputs.mask_NT
        check_mask(mask)
        obs = self._view.encode(inputs.columns, inputs.step_N)
        temperature = np.asarray(carry["temperature"], dtype=np.float64)
        found, carry = self._logits(obs, mask, carry)
        logits = found / np.where(np.isfinite(temperature), temperature, 1.0)[:, None]
        uniform = uniform_log_probs(mask)
        own = tree.log_softmax(logits, mask)
        draws = inputs.uniforms[:, 1:]
        chosen = tree.sample(own, mask, draws) if self.sampled else _greedy(logits, mask)
        epsilon = np.asarray(carry["epsilon"], dtype=np.float64)
        explores = inputs.uniforms[:, 0] < epsilon
        actions = np.where(explores[:, None], tree.sample(uniform, mask, draws), chosen).astype(np.int8)
        if self.sampled:
            own_logp, own_ops = tree.log_prob(own, actions, mask), np.exp(own[:, OP_SLICE])
        else:
            own_logp = np.where((actions == chosen).all(axis=1), 0.0, -np.inf)
            own_ops = np.eye(NUM_OPS)[chosen[:, 0]]
        logp = mix(own_logp, tree.log_prob(uniform, actions, mask), epsilon)
        op_probs = (1 - epsilon)[:, None] * own_ops + epsilon[:, None] * np.exp(uniform[:, OP_SLICE])
        return Decision(actions_NA=actions, logp_N=logp, op_probs=op_probs, carry=carry)

    def _logits(self, obs_NV: NDArray[np.float32], mask_NT: Bools, carry: Carry) -> tuple[Floats, Carry]:
        """Return float64 logits and the memory after them, computed in blocks of exactly BLOCK_ROWS rows."""
        num = len(obs_NV)
        out = np.empty((num, TREE_WIDTH), dtype=np.float64)
        memory = np.asarray(carry.get("memory", np.zeros((num, 0))), dtype=np.float32)
        after = np.empty_like(memory)
        for first in range(0, num, BLOCK_ROWS):
            part = slice(first, min(first + BLOCK_ROWS, num))
            rows = part.stop - first
            obs, before = (np.zeros((BLOCK_ROWS, given.shape[1]), dtype=np.float32) for given in (obs_NV, memory))
            mask = np.zeros((BLOCK_ROWS, TREE_WIDTH), dtype=bool)
            mask[:, OP_SLICE.start] = True
            obs[:rows], mask[:rows], before[:rows] = obs_NV[part], mask_NT[part], memory[part]
            with single_thread(), torch.no_grad():
                entries, then = self.network.step(torch.from_numpy(obs), torch.from_numpy(before))
                block = self.network.logits_of(entries, torch.from_numpy(mask))
            out[part], after[part] = block[:rows].numpy(), then[:rows].numpy()
        return out, {**carry, "memory": after} if "memory" in carry else carry


def mix(own_logp: Floats, uniform_logp: Floats, epsilon: Floats) -> Floats:
    """Return log((1 - epsilon) * own + epsilon * u) of actions, exact at both ends."""
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(np.log1p(-epsilon) + own_logp, np.log(epsilon) + uniform_logp)
    return np.where(epsilon > 0, mixed, own_logp)


def _greedy(logits_NT: Floats, mask_NT: Bools) -> Actions:
    if not len(mask_NT):
        return np.zeros((0, len(WAIT_ROW)), dtype=np.int8)
    actions: Actions = tree_torch.greedy(torch.from_numpy(logits_NT), torch.from_numpy(mask_NT)).numpy()
    return actions
