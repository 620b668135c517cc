"""Branchings that a remedy could hold: an op that was never taken in a state in which it is valid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline.actions import (
    ACTION_WIDTH,
    DWELL_EPOCHS,
    LEVERS,
    MAX_SLOTS,
    TEMPO_EPOCHS,
    TREE_WIDTH,
    Actions,
    Bools,
    Op,
    lever_slice,
    slot_slice,
    unpack_mask,
)
from esper.leyline.matrix import Branch, BranchActor, ForcedAction
from quality.suggest_data import ActionCounts, Findings
from quality.suggest_effects import TAKEN, VALID, WIDTH, Aim, Choice, Part, unseen_pairs, unseen_values

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SNAPSHOT_EPOCHS = 5
"""A branch is computed again from the last multiple of this, the trunk beside it."""

MAX_PER_PARENT = 4
"""Branchings of one episode: many leave from few, since a parent is computed once."""

MAX_PER_OP = 2_000

SHORTEST_LIFE = {
    Op.GERMINATE: DWELL_EPOCHS[0] + TEMPO_EPOCHS[0] + 2,
    Op.ADVANCE: TEMPO_EPOCHS[0] + 2,
    Op.WAIT: 3,
    Op.PRUNE: 3,
}
"""Epochs that an op needs before it has told anything: for a seed's begin, those to its commitment at the least."""

ASKED_EPOCHS = 2
"""What a life takes longer where every gate is asked: an ADVANCE before training, and one before holding."""

_FOLLOWS = {Op.ADVANCE: (Op.GERMINATE,), Op.FOSSILIZE: (Op.GERMINATE, Op.ADVANCE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Branchings that could be made: B of them.

    Attributes:
        state: Index of the state, int64 [B].
        op: The op that is forced, int64 [B].
        slots: The slots in which the op is valid, bool [B, 6].
        cost: Host epochs, without the parent's, int64 [B].
        deltas: What each adds to the sums, float64 [B, WIDTH], without what depends on earlier choices.
    """

    state: Ints
    op: Ints
    slots: Bools
    cost: Ints
    deltas: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One branching and what it is expected to bring."""

    rate: float
    index: int
    cost: int
    delta: Floats


class Branches:
    """The branchings of a remedy."""

    def __init__(self, findings: Findings, aim: Aim, candidates: Candidates) -> None:
        self.findings = findings
        self.aim = aim
        self.chosen: list[Branch] = []
        self.counts = {name: findings.counts.get(name, ActionCounts.empty()).copy() for name in findings.sites}
        self._candidates = candidates
        self._free = np.ones(len(self._candidates.state), dtype=bool)
        self._per_parent = np.zeros(len(findings.parents), dtype=np.int64)

    def best(self, choice: Choice) -> Offer | None:
        """Return the branching that brings most per host epoch, None where no state is left."""
        found, states = self._candidates, self.findings.states
        self._free &= self._per_parent[states.parent[found.state]] < MAX_PER_PARENT
        index = np.flatnonzero(self._free)
        if not index.size:
            return None
        state = found.state[index]
        deltas = self._with_dependent(choice, index)
        unused = self._per_parent[states.parent[state]] == 0
        cost = found.cost[index] + np.where(unused, horizons(self.findings)[state], 0)
        rate = self.aim.lift(choice, deltas) / cost
        best = int(rate.argmax())
        return Offer(rate=float(rate[best]), index=int(index[best]), cost=int(cost[best]), delta=deltas[best])

    def take(self, choice: Choice, offer: Offer) -> None:
        """Add an offer to the choice: its action gets the slot and the levers that were taken least."""
        found, states = self._candidates, self.findings.states
        state, op = int(found.state[offer.index]), Op(int(found.op[offer.index]))
        parent = self.findings.parents[states.parent[state]]
        site, step = self.findings.sites[parent.environment], int(states.step[state])
        mask_T = unpack_mask(np.frombuffer(states.mask[state], dtype=np.uint8)[None])[0]
        counts = self.counts[parent.environment]
        left = site.spec.horizon - step - ASKED_EPOCHS * site.spec.ask_at_every_gate
        action = choose_action(op, mask_T, counts, left)
        if op is not Op.WAIT:
            counts.add(action.tolist())
        for follower, causes in _FOLLOWS.items():
            if op in causes:
                counts.slot_ops[action[1], follower] += 1
        self.chosen.append(
            Branch(
                environment=parent.environment,
                reward=site.reward,
                replicate=parent.replicate,
                step=step,
                parent=parent.actor,
                action=ForcedAction.of_row(action, site.spec.host.topology),
                then=BranchActor(controller="complete"),
            )
        )
        survival = choice.survival.copy()
        cluster = states.cluster[state]
        if cluster >= 0 and not self.findings.cluster_ops[cluster, op]:
            survival[cluster] = 0.0
        choice.add(offer.delta, survival, 1, offer.cost)
        self._per_parent[states.parent[state]] += 1
        self._free &= found.state != state

    def _with_dependent(self, choice: Choice, index: Ints) -> Floats:
        """The deltas with what depends on earlier choices: clusters that still hold one op, pairs not yet taken."""
        states = self.findings.states
        state, op = self._candidates.state[index], self._candidates.op[index]
        deltas = self._candidates.deltas[index]
        cluster = states.cluster[state]
        if self.findings.cluster_ops.size:
            other = (cluster >= 0) & ~self.findings.cluster_ops[cluster, op]
            deltas[:, Part.SINGLE_CLUSTERS] = -np.where(other, choice.survival[cluster], 0.0)
        slots_B6 = self._candidates.slots[index]
        for name, site in self.findings.sites.items():
            here, counts = states.environment[state] == name, self.counts[name]
            germinates = here & (op == Op.GERMINATE)
            deltas[:, Part.TEMPO_PAIRS] += germinates & unseen_pairs(site, counts).any()
            _, *levers = unseen_values(site, counts)
            deltas[:, Part.VALUES] += germinates * sum(int(unseen.any()) for unseen in levers)
            empty = here & (slots_B6 & (counts.slot_ops[:, op].T == 0)).any(axis=1)
            deltas[:, Part.VALUES] += empty & (op != Op.WAIT)
        return deltas


def horizons(findings: Findings) -> Ints:
    """Return the horizon of each state's environment, 0 where it cannot be extended, int64 [N]."""
    by_name = {name: site.spec.horizon for name, site in findings.sites.items()}
    return np.array([by_name.get(name, 0) for name in findings.states.environment], dtype=np.int64)


def branch_candidates(findings: Findings) -> Candidates:
    """Return every op that is valid in a state and was never taken there, where what it begins can still end.

    Of each op at most MAX_PER_OP are kept, those in clusters with a single op first.
    """
    states = findings.states
    horizon_N = horizons(findings)
    usable = (horizon_N > 0) & (states.parent >= 0)
    state, op = np.nonzero(states.valid_NO & ~states.taken_NO & usable[:, None])
    left = horizon_N[state] - states.step[state]
    shortest = np.array([SHORTEST_LIFE.get(name, 1) for name in Op])
    asking = [name for name, site in findings.sites.items() if site.spec.ask_at_every_gate]
    asked = np.isin(np.array(states.environment)[state], asking) & np.isin(op, (Op.GERMINATE, Op.ADVANCE))
    fits = left >= np.minimum(shortest[op] + ASKED_EPOCHS * asked, horizon_N[state] // 2)
    kept = np.flatnonzero(fits)
    single = np.append(findings.cluster_ops.sum(axis=1) == 1, False)[states.cluster[state[kept]]]
    kept = kept[np.argsort(~single, kind="stable")]
    kept = np.concatenate([kept[op[kept] == acting][:MAX_PER_OP] for acting in Op])
    state, op, left = state[kept], op[kept], left[kept]
    deltas = np.zeros((len(state), WIDTH))
    for name in findings.sites:
        here = states.environment[state] == name
        deltas[here] = _afterwards(findings, name, op[here], left[here])
    deltas[:, VALID] += states.valid_NO[state]
    deltas[np.arange(len(state)), TAKEN.start + op] += 1
    deltas[:, Part.COMPARED] += states.actions[state] == 1
    packed = b"".join(states.mask[index] for index in state)
    masks_BT = unpack_mask(np.frombuffer(packed, dtype=np.uint8).reshape(len(state), (TREE_WIDTH + 7) // 8))
    slots = np.zeros((len(state), MAX_SLOTS), dtype=bool)
    for acting in list(Op)[1:]:
        slots[op == acting] = masks_BT[op == acting][:, slot_slice(acting)]
    cost = 2 * (left + states.step[state] % SNAPSHOT_EPOCHS)
    return Candidates(state=state, op=op, slots=slots, cost=cost, deltas=deltas)


def _afterwards(findings: Findings, name: str, op_B: Ints, left_B: Ints) -> Floats:
    """What follows while every seed is carried to its end: mostly WAIT, then ADVANCE and FOSSILIZE."""
    arms = [arm for (where, _, _), arm in findings.arms.items() if where == name]
    decided = max(sum(float(arm.taken.sum()) * arm.episodes for arm in arms), 1.0)
    epochs = max(sum(arm.episodes for arm in arms) * findings.sites[name].spec.horizon, 1)
    germinate = sum(float(arm.valid[Op.GERMINATE]) * arm.episodes for arm in arms) / decided
    states = sum(arm.states * arm.episodes for arm in arms) / decided
    rows_B = (left_B - 1) * decided / epochs
    delta = np.zeros((len(op_B), WIDTH))
    delta[:, Op.WAIT] = rows_B
    delta[:, Op.GERMINATE] = rows_B * germinate
    for follower, causes in _FOLLOWS.items():
        follows = np.isin(op_B, causes)
        delta[follows, follower] += 1
        delta[follows, TAKEN.start + follower] += 1
        delta[follows, Op.PRUNE] += np.minimum(rows_B, TEMPO_EPOCHS[0] + 1)[follows]
    delta[:, TAKEN.start + Op.WAIT] = np.maximum(rows_B - delta[:, TAKEN].sum(axis=1), 0)
    delta[:, Part.STATES] = rows_B * min(states, 1.0)
    return delta


def choose_action(op: Op, mask_T: Bools, counts: ActionCounts, left: int) -> Actions:
    """Return a valid action of an op, int8 [A]: slot and levers that were taken least.

    Args:
        op: The op, valid in the mask.
        mask_T: The action mask of the state.
        counts: How often actions were taken.
        left: Epochs left; a seed gets a dwell and a tempo with which it can be committed, where there is one.
    """
    action = np.zeros(ACTION_WIDTH, dtype=np.int8)
    action[0] = op
    if op is Op.WAIT:
        return action
    slots = mask_T[slot_slice(op)]
    action[1] = slot = _least(counts.slot_ops[:, op], slots)
    if op is not Op.GERMINATE:
        return action
    on_offer = [mask_T[lever_slice(slot, lever)] for lever in range(len(LEVERS))]
    pairs = np.where(on_offer[2][None], counts.blueprint_tempos, np.iinfo(np.int64).max)
    action[2] = blueprint = _least(pairs.min(axis=1) * 1_000 + counts.slot_blueprints[slot], on_offer[0])
    dwells = on_offer[3] & (np.array(DWELL_EPOCHS) + TEMPO_EPOCHS[0] + 2 <= left)
    action[5] = dwell = _least(counts.levers[3], dwells if dwells.any() else on_offer[3])
    tempos = on_offer[2] & (np.array(TEMPO_EPOCHS) + DWELL_EPOCHS[dwell] + 2 <= left)
    action[4] = _least(counts.blueprint_tempos[blueprint], tempos if tempos.any() else on_offer[2])
    for lever in (1, 4, 5):
        action[2 + lever] = _least(counts.levers[lever], on_offer[lever])
    return action


def _least(counts: Ints, allowed: Bools) -> int:
    """The allowed index with the smallest count, the first of several."""
    return int(np.where(allowed, counts, np.iinfo(np.int64).max).argmin())
