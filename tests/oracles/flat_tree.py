"""A flat problem written in the tree, so that the shipped learners solve it unchanged and exactly as a flat one.

Flat action k of n (n is at most 5) is op k: WAIT for 0, each other op on slot 0, GERMINATE with the first value of each
lever. Those are the only valid leaves, one below each op, and a flat network's entries are its n outputs at the ops and
0 elsewhere. Every sum, maximum and logsumexp below an op is then over one leaf and adds exactly 0: Q(s, a) is the
output, the joint logsumexp that of n numbers, log pi(a | s) a softmax over n numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from esper.leyline.actions import ACTION_WIDTH, LEVERS, NUM_OPS, TREE_WIDTH, Op, check_mask, lever_slice, slot_slice
from esper.simic.batches import Transitions
from esper.tamiyo.networks import NetworkSpec, TreeNet


def flat_mask(num_rows: int, num_actions: int) -> np.ndarray:
    """The mask that allows the flat actions alone, in every row."""
    mask = np.zeros((num_rows, TREE_WIDTH), dtype=bool)
    mask[:, :num_actions] = True
    for op in range(1, num_actions):
        mask[:, slot_slice(op).start] = True
    if num_actions > Op.GERMINATE:
        for lever in range(len(LEVERS)):
            mask[:, lever_slice(0, lever).start] = True
    check_mask(mask)
    return mask


def tree_actions(ids_N: np.ndarray) -> np.ndarray:
    """The canonical action of each flat one."""
    actions = np.zeros((len(ids_N), ACTION_WIDTH), dtype=np.int8)
    actions[:, 0] = ids_N
    return actions


def flat_transitions(episodes: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]], num_actions: int) -> Transitions:
    """Episodes of (observations [T + 1, V], action ids [T], rewards [T], terminated) as one-step transitions."""
    lengths = np.array([len(ids) for _, ids, _, _ in episodes])
    first = np.cumsum(lengths + 1) - lengths - 1
    state = np.concatenate([start + np.arange(length) for start, length in zip(first, lengths)])
    last = np.cumsum(lengths) - 1
    discount = np.ones(len(state))
    discount[last] = [not terminated for _, _, _, terminated in episodes]
    total = np.array([rewards.sum() for _, _, rewards, _ in episodes], dtype=np.float64)
    episode = np.repeat(np.arange(len(episodes)), lengths)
    obs = np.concatenate([obs for obs, _, _, _ in episodes]).astype(np.float32)
    return Transitions(
        view="v1",
        environments=("flat",),
        obs_MV=obs,
        mask_MT=flat_mask(len(obs), num_actions),
        state_N=state,
        next_N=state + 1,
        action_NA=tree_actions(np.concatenate([ids for _, ids, _, _ in episodes])),
        reward_N=np.concatenate([rewards for _, _, rewards, _ in episodes]).astype(np.float64),
        discount_N=discount,
        forced_N=np.zeros(len(state), dtype=bool),
        env_seed_N=episode,
        environment_N=np.zeros(len(state), dtype=np.int64),
        episode_N=episode,
        return_N=total[episode],
        logp_N=np.full(len(state), np.nan),
    )


class Standardiser(nn.Module):
    """(x - mean) / sd of plain columns, where a network's `encoder.normaliser` is expected."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("sd", torch.ones(num_inputs))

    def fit_blocks(self, blocks: Iterable[Tensor]) -> None:
        obs_NV = torch.cat([*blocks])
        self.mean.copy_(obs_NV.mean(dim=0))
        self.sd.copy_(obs_NV.std(dim=0, correction=0))

    def forward(self, obs_NV: Tensor) -> Tensor:
        return (obs_NV - self.mean) / self.sd


def perceptron(num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> nn.Sequential:
    widths = (num_inputs, *hidden)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))


class FlatTreeNet(TreeNet):
    """A perceptron where a tree network is expected; everything that reads its entries is TreeNet's own."""

    num_inputs, num_actions, hidden = 4, 2, (256, 256)

    def __init__(self, spec: NetworkSpec) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self.leaves = None
        self.encoder = nn.Module()
        self.encoder.normaliser = Standardiser(self.num_inputs)
        self.layers = perceptron(self.num_inputs, self.hidden, self.num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        values = self.layers(self.encoder.normaliser(obs))
        return nn.functional.pad(values, (0, TREE_WIDTH - self.num_actions))


class FlatValueNet(nn.Module):
    """A perceptron where a state value network is expected."""

    num_inputs, hidden = FlatTreeNet.num_inputs, FlatTreeNet.hidden

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = nn.Module()
        self.encoder.normaliser = Standardiser(self.num_inputs)
        self.layers = perceptron(self.num_inputs, self.hidden, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.layers(self.encoder.normaliser(obs)).squeeze(1)


def shapes(num_inputs: int, num_actions: int, hidden: tuple[int, ...]) -> SimpleNamespace:
    """The two networks for a problem of given sizes, as `tree` and `value`."""
    assert 1 <= num_actions <= NUM_OPS
    sizes = {"num_inputs": num_inputs, "hidden": hidden}
    tree = type("FlatTreeNetOf", (FlatTreeNet,), sizes | {"num_actions": num_actions})
    return SimpleNamespace(tree=tree, value=type("FlatValueNetOf", (FlatValueNet,), sizes))
