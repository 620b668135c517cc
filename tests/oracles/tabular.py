"""Random tabular MDPs with 12 actions spelled on the tree, their exact values, and a table as action values.

12 actions: WAIT, ADVANCE in six slots, FOSSILIZE in five. The dynamics do not depend on the clock, so fitted Q
evaluation with exactly H sweeps and no clock in the state is backward induction over H decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from esper.leyline.actions import ACTION_WIDTH, TREE_WIDTH, Op, check_mask, slot_slice
from esper.leyline.keys import numpy_generator
from esper.leyline.tree import enumerate_actions
from esper.simic.batches import Transitions
from esper.simic.ope.fqe import Starts
from esper.simic.ope.targets import TargetPolicy, TreePolicy, mixture

S, A, H = 15, 12, 25


def twelve_actions() -> tuple[np.ndarray, np.ndarray]:
    """The mask [T] and the rows [12, 8] of the twelve actions."""
    mask = np.zeros(TREE_WIDTH, dtype=bool)
    mask[[Op.WAIT, Op.ADVANCE, Op.FOSSILIZE]] = True
    mask[slot_slice(Op.ADVANCE)] = True
    mask[slot_slice(Op.FOSSILIZE).start : slot_slice(Op.FOSSILIZE).stop - 1] = True
    check_mask(mask[None])
    rows = enumerate_actions(mask)
    assert rows.shape == (A, ACTION_WIDTH)
    return mask, rows


MASK, ACTIONS = twelve_actions()


def tree_policy(probs_SA: np.ndarray) -> TargetPolicy:
    """The same policy as log-probabilities by choice."""
    logp = np.full((len(probs_SA), TREE_WIDTH), -np.inf)
    for op in (Op.WAIT, Op.ADVANCE, Op.FOSSILIZE):
        of = ACTIONS[:, 0] == op
        total = probs_SA[:, of].sum(axis=1)
        logp[:, int(op)] = np.log(total)
        if op is not Op.WAIT:
            entries = slot_slice(op).start + ACTIONS[of, 1]
            logp[:, entries] = np.log(probs_SA[:, of] / total[:, None])
    return mixture([(1.0, TreePolicy(logp))])


@dataclass(frozen=True)
class Mdp:
    next_SAS: np.ndarray
    reward_SA: np.ndarray
    start_S: np.ndarray
    behaviour_SA: np.ndarray
    target_SA: np.ndarray

    def value(self, policy_SA: np.ndarray) -> float:
        """The expected undiscounted return of H decisions."""
        value = np.zeros(S)
        for _ in range(H):
            value = (policy_SA * (self.reward_SA + self.next_SAS @ value)).sum(axis=1)
        return float(self.start_S @ value)

    def episodes(self, num: int, *key: str | int) -> Transitions:
        """Episodes of the behaviour, each its own env_seed; state m of the transitions is state m of the MDP."""
        rng = numpy_generator("tabular", *key)
        state = _draw(rng, np.tile(self.start_S, (num, 1)))
        states, actions, rewards, nexts = [], [], [], []
        for _ in range(H):
            action = _draw(rng, self.behaviour_SA[state])
            following = _draw(rng, self.next_SAS[state, action])
            states.append(state), actions.append(action), nexts.append(following)
            rewards.append(self.reward_SA[state, action] + rng.normal(0, 0.1, size=num))
            state = following
        s, a, r, n = (np.stack(part, axis=1).ravel() for part in (states, actions, rewards, nexts))
        episode = np.repeat(np.arange(num), H)
        total = np.bincount(episode, weights=r)
        return Transitions(
            view="table",
            environments=("mdp",),
            obs_MV=np.eye(S, dtype=np.float32),
            mask_MT=np.tile(MASK, (S, 1)),
            state_N=s,
            next_N=n,
            action_NA=ACTIONS[a],
            reward_N=r,
            discount_N=np.ones(len(r)),
            forced_N=np.zeros(len(r), dtype=bool),
            env_seed_N=episode,
            environment_N=np.zeros(len(r), dtype=np.int64),
            episode_N=episode,
            return_N=total[episode],
            logp_N=np.log(self.behaviour_SA[s, a]),
        )


def _draw(rng: np.random.Generator, probs_NX: np.ndarray) -> np.ndarray:
    return (rng.random(len(probs_NX))[:, None] > probs_NX.cumsum(axis=1)[:, :-1]).sum(axis=1)


def random_mdp(seed: int) -> Mdp:
    """Behaviour: half a mild softmax of the action values, half uniform; target: a much sharper softmax."""
    rng = numpy_generator("random mdp", seed)
    following = rng.dirichlet(np.full(S, 0.2), size=(S, A))
    reward = rng.normal(size=(S, A)) * (rng.random((S, A)) < 0.5)
    start = rng.dirichlet(np.ones(S))
    value = np.zeros(S)
    for _ in range(H):
        quality = reward + following @ value
        value = quality.max(axis=1)

    def softmax(sharpness: float) -> np.ndarray:
        weights = np.exp(sharpness * (quality - quality.max(axis=1, keepdims=True)))
        return weights / weights.sum(axis=1, keepdims=True)

    return Mdp(following, reward, start, 0.5 * softmax(1.0) + 0.5 / A, softmax(4.0))


def starts_of_episodes(data: Transitions) -> Starts:
    first = np.flatnonzero(np.diff(data.episode_N, prepend=-1) != 0)
    return Starts(data.state_N[first], np.zeros(len(first), dtype=np.int64), data.env_seed_N[first])


class Table:
    """Q(s, a) as the mean target of the rows of each cell; 0 where there is none."""

    def __init__(self, seed: int = 0, sweeps: int = 0) -> None:
        self.entries_ST = torch.zeros(S, TREE_WIDTH, dtype=torch.float64)

    def entries(self, obs_NV: torch.Tensor) -> torch.Tensor:
        return self.entries_ST[obs_NV.argmax(dim=1)]

    def draw(self, num_rows: int) -> np.ndarray:
        return np.arange(num_rows)

    def regress(self, obs_NV: torch.Tensor, action_NA: torch.Tensor, target_N: torch.Tensor) -> None:
        leaf = torch.where(action_NA[:, 0] == Op.WAIT, 0, slot_slice_start(action_NA) + action_NA[:, 1].long())
        cell = obs_NV.argmax(dim=1) * TREE_WIDTH + leaf
        size = S * TREE_WIDTH
        count = torch.bincount(cell, minlength=size)
        total = torch.bincount(cell, weights=target_N.double(), minlength=size)
        self.entries_ST = (total / count.clamp(min=1)).reshape(S, TREE_WIDTH)

    def state(self) -> torch.Tensor:
        return self.entries_ST.clone()

    def restore(self, state: torch.Tensor) -> None:
        self.entries_ST = state


def slot_slice_start(action_NA: torch.Tensor) -> torch.Tensor:
    starts = torch.tensor([0, *(slot_slice(op).start for op in range(1, 5))])
    return starts[action_NA[:, 0].long()]
