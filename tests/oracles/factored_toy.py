"""A growth problem in miniature with a known answer: Esper's own action tree, no host to train.

Five ops, three slots, eight blueprints, four tempos, 25 decisions. A seed trains for two decisions, is advanced, blends
for its tempo, holds, and is fossilized or pruned. What a fossil is worth depends on the episode's context (one of four,
seen through noise alone), the slot, the blueprint and the tempo together:

    worth = SCALE * (fit[context, blueprint] + place[context, slot] + pace[blueprint, tempo]
                     + clash[context, slot, blueprint]) - SHIFT

paid when it is fossilized, with noise. Every live seed costs rent, a germination and a pruning cost a little more.
Eleven heuristics, most of them bad, mixed with 10, 30 and 60 % of the uniform policy make the data, as they do in the
real data sets. Observations have the 27 columns of view v1, only so that the networks know their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.leyline import tree
from esper.leyline.actions import (
    ACTION_WIDTH,
    LEVERS,
    TREE_WIDTH,
    Actions,
    Bools,
    Op,
    check_mask,
    is_forced,
    is_valid,
    lever_slice,
    slot_slice,
)
from esper.leyline.keys import numpy_generator
from esper.leyline.views import get_view
from esper.simic.batches import Transitions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HORIZON, SLOTS, BLUEPRINTS, CONTEXTS = 25, 3, 8, 4
TEMPO = (3, 5, 8, 12)
TRAINING_STEPS = 2
DORMANT, TRAINING, BLENDING, HOLDING, FOSSIL = range(5)
SCALE, SHIFT = 0.305, 0.065
RENT, GERMINATION, PRUNING = 0.008, 0.018, 0.018
PAYOFF_NOISE, PROBE_NOISE, CONTEXT_NOISE = 0.1, 0.25, 0.3
EPSILONS = (0.1, 0.3, 0.6)
FIRST_DATA_SEED = 1_000_000
TEMPO_LEVER = LEVERS.index("tempo")


def _worth() -> Floats:
    """The worth of every fossil, [context, slot, blueprint, tempo]."""
    rng = numpy_generator("factored toy", "worth")
    fit = rng.normal(size=(CONTEXTS, 1, BLUEPRINTS, 1))
    place = 0.5 * rng.normal(size=(CONTEXTS, SLOTS, 1, 1))
    pace = 0.5 * rng.normal(size=(1, 1, BLUEPRINTS, len(TEMPO)))
    clash = 0.5 * rng.normal(size=(CONTEXTS, SLOTS, BLUEPRINTS, 1))
    return SCALE * (fit + place + pace + clash) - SHIFT


WORTH = _worth()
_LOOKS = numpy_generator("factored toy", "looks").normal(size=(CONTEXTS, 6))


@dataclass(slots=True)
class World:
    """N episodes in step; every draw is keyed by the episode's own seed."""

    seed_N: Ints
    context_N: Ints
    stage_NS: Ints
    age_NS: Ints
    blueprint_NS: Ints
    tempo_NS: Ints
    noise: Floats
    step: int = 0

    @classmethod
    def start(cls, seeds: Sequence[int]) -> World:
        """Return new episodes; the same seed is the same context and noise whoever acts."""
        draws = [numpy_generator("factored toy", "episode", int(seed)) for seed in seeds]
        context = np.array([rng.integers(CONTEXTS) for rng in draws])
        noise = np.stack([rng.normal(size=(HORIZON + 1, 6 + 2 * SLOTS)) for rng in draws])
        zeros = [np.zeros((len(draws), SLOTS), dtype=np.int64) for _ in range(4)]
        return cls(np.array(seeds), context, *zeros, noise)

    def worth_NS(self) -> Floats:
        """What the seed in each slot is worth as a fossil."""
        return WORTH[self.context_N[:, None], np.arange(SLOTS), self.blueprint_NS, self.tempo_NS]

    def observe(self) -> NDArray[np.float32]:
        """Return the observations, float32 [N, 27]."""
        noise = self.noise[:, self.step]
        obs = np.zeros((len(self.seed_N), get_view("v1").width), dtype=np.float32)
        obs[:, 0] = self.step / HORIZON
        obs[:, 1:7] = _LOOKS[self.context_N] + CONTEXT_NOISE * noise[:, :6]
        for slot in range(SLOTS):
            column = 7 + 6 * slot
            for index, stage in enumerate((TRAINING, BLENDING, HOLDING, FOSSIL)):
                obs[:, column + index] = self.stage_NS[:, slot] == stage
            obs[:, column + 4] = self.age_NS[:, slot] / max(TEMPO)
            seen = self.probe_NS()[:, slot]
            obs[:, column + 5] = np.where(self.stage_NS[:, slot] == HOLDING, seen, 0.0)
        return obs

    def probe_NS(self) -> Floats:
        """A noisy look at what each seed is worth."""
        return self.worth_NS() + PROBE_NOISE * self.noise[:, self.step, 6 : 6 + SLOTS]

    def mask(self) -> Bools:
        """Return what is valid, bool [N, TREE_WIDTH]."""
        mask = np.zeros((len(self.seed_N), TREE_WIDTH), dtype=bool)
        mask[:, Op.WAIT] = True
        if self.step == HORIZON:
            return mask
        live = (self.stage_NS >= TRAINING) & (self.stage_NS <= HOLDING)
        for slot in range(SLOTS):
            free = self.stage_NS[:, slot] == DORMANT
            mask[:, slot_slice(Op.GERMINATE)][:, slot] = free
            for lever in range(len(LEVERS)):
                part = lever_slice(slot, lever)
                many = {0: BLUEPRINTS, TEMPO_LEVER: len(TEMPO)}.get(lever, 1)
                mask[:, part.start : part.start + many] = free[:, None]
            grown = (self.stage_NS[:, slot] == TRAINING) & (self.age_NS[:, slot] >= TRAINING_STEPS)
            mask[:, slot_slice(Op.ADVANCE)][:, slot] = grown
            mask[:, slot_slice(Op.FOSSILIZE)][:, slot] = self.stage_NS[:, slot] == HOLDING
            mask[:, slot_slice(Op.PRUNE)][:, slot] = live[:, slot]
        for op in list(Op)[1:]:
            mask[:, op] = mask[:, slot_slice(op)].any(axis=1)
        return mask

    def act(self, actions_NA: Actions) -> Floats:
        """Carry out one decision per episode and return the rewards, [N]."""
        reward = np.zeros(len(self.seed_N))
        paid = self.worth_NS() + PAYOFF_NOISE * self.noise[:, self.step, 6 + SLOTS :]
        for slot in range(SLOTS):
            chosen = actions_NA[:, 1] == slot
            germinates, advances, commits, prunes = (chosen & (actions_NA[:, 0] == op) for op in list(Op)[1:])
            reward += commits * paid[:, slot] - germinates * GERMINATION - prunes * PRUNING
            stage, age = self.stage_NS[:, slot], self.age_NS[:, slot]
            stage[germinates], stage[advances], stage[commits], stage[prunes] = TRAINING, BLENDING, FOSSIL, DORMANT
            age[germinates | advances] = 0
            self.blueprint_NS[germinates, slot] = actions_NA[germinates, 2]
            self.tempo_NS[germinates, slot] = actions_NA[germinates, 2 + TEMPO_LEVER]
            age += 1
            stage[(stage == BLENDING) & (age > np.take(TEMPO, self.tempo_NS[:, slot]))] = HOLDING
            reward -= RENT * ((stage >= TRAINING) & (stage <= HOLDING))
        self.step += 1
        return reward


Policy = Callable[[World, Bools], Actions]
"""Whole valid actions, int8 [N, A], from the world as it is: learned policies look at `observe` alone."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A heuristic: what it germinates, from when on, how many at once, and whether it looks before it fossilizes."""

    blueprint: int
    tempo: int
    gate: str
    first_step: int = 2
    at_once: int = 1
    rotates: bool = False

    def __call__(self, world: World, mask: Bools) -> Actions:
        actions = np.zeros((len(mask), ACTION_WIDTH), dtype=np.int8)
        live = ((world.stage_NS >= TRAINING) & (world.stage_NS <= HOLDING)).sum(axis=1)
        may = mask[:, Op.GERMINATE] & (live < self.at_once) & (world.step >= self.first_step)
        slot = mask[:, slot_slice(Op.GERMINATE)].argmax(axis=1)
        shift = slot if self.rotates else 0
        actions[may, 0], actions[may, 1] = Op.GERMINATE, slot[may]
        actions[may, 2] = ((self.blueprint + shift) % BLUEPRINTS * np.ones(len(mask), dtype=int))[may]
        actions[may, 2 + TEMPO_LEVER] = self.tempo
        probe = world.probe_NS()
        for index in range(SLOTS):
            good = {"none": np.ones(len(mask), bool), "keep": probe[:, index] > 0, "invert": probe[:, index] < 0}
            for op, wanted in ((Op.ADVANCE, True), (Op.FOSSILIZE, good[self.gate]), (Op.PRUNE, ~good[self.gate])):
                holding = world.stage_NS[:, index] == HOLDING
                rows = mask[:, slot_slice(op)][:, index] & wanted & (holding | (op == Op.ADVANCE))
                actions[rows] = 0
                actions[rows, 0], actions[rows, 1] = op, index
        return actions


def uniform(world: World, mask: Bools) -> Actions:
    """The hierarchical uniform policy."""
    logp = tree.log_softmax(tree.uniform_logits(len(mask)), mask)
    return tree.sample(logp, mask, _draws("uniform", world))


def _draws(purpose: str, world: World) -> Floats:
    key = ("factored toy", purpose, world.seed_N.tolist(), world.step)
    return numpy_generator(*key).random((len(world.seed_N), ACTION_WIDTH))


def hand_oracle(world: World, mask: Bools) -> Actions:
    """Knows the context and the table: the best blueprint and tempo of every slot at once, nothing that loses."""
    actions = np.zeros((len(mask), ACTION_WIDTH), dtype=np.int8)
    lasts = np.array([TRAINING_STEPS + tempo + 2 for tempo in TEMPO])
    worth = WORTH[world.context_N] - GERMINATION - RENT * lasts
    worth = np.where(world.step + lasts + SLOTS <= HORIZON, worth, -np.inf).reshape(len(mask), SLOTS, -1)
    best, gain = worth.argmax(axis=2), worth.max(axis=2)
    for slot in range(SLOTS):
        grows = mask[:, slot_slice(Op.GERMINATE)][:, slot] & (gain[:, slot] > 0)
        actions[grows] = 0
        actions[grows, 0], actions[grows, 1] = Op.GERMINATE, slot
        actions[grows, 2], actions[grows, 2 + TEMPO_LEVER] = np.divmod(best[grows, slot], len(TEMPO))
    for op in (Op.ADVANCE, Op.FOSSILIZE):
        for slot in range(SLOTS):
            rows = mask[:, slot_slice(op)][:, slot]
            actions[rows] = 0
            actions[rows, 0], actions[rows, 1] = op, slot
    return actions


HEURISTICS: dict[str, Policy] = {
    "first": Rule(1, 2, "none"),
    "second": Rule(6, 0, "none", first_step=0),
    "third": Rule(5, 2, "none", at_once=2),
    "late": Rule(7, 1, "none", first_step=8),
    "hasty": Rule(3, 0, "keep", first_step=0, at_once=3),
    "careful": Rule(1, 1, "keep"),
    "patient": Rule(4, 3, "keep", first_step=0, at_once=2),
    "explorer": Rule(0, 0, "keep", first_step=0, at_once=3, rotates=True),
    "cycler": Rule(3, 1, "none", rotates=True),
    "inverted": Rule(6, 0, "invert", first_step=0, at_once=2),
    "random": uniform,
}


def mixed(policy: Policy, epsilon: float, name: str) -> Policy:
    """Return the policy with a share epsilon of the uniform one."""

    def act(world: World, mask: Bools) -> Actions:
        coin = _draws(f"coin {name} {epsilon}", world)[:, 0] < epsilon
        logp = tree.log_softmax(tree.uniform_logits(len(mask)), mask)
        explored = tree.sample(logp, mask, _draws(f"explored {name} {epsilon}", world))
        return np.where(coin[:, None], explored, policy(world, mask)).astype(np.int8)

    return act


def play(policy: Policy, seeds: Sequence[int]) -> Transitions:
    """Return the transitions of one episode per seed."""
    world = World.start(seeds)
    num = len(seeds)
    obs, masks, actions, rewards = [world.observe()], [world.mask()], [], []
    for _ in range(HORIZON):
        chosen = policy(world, masks[-1])
        if not is_valid(chosen, masks[-1]).all():
            raise AssertionError(f"invalid action at step {world.step}")
        actions.append(chosen)
        rewards.append(world.act(chosen))
        obs.append(world.observe())
        masks.append(world.mask())
    mask = np.stack(masks, axis=1).reshape(-1, TREE_WIDTH)
    check_mask(mask)
    states = np.arange(num * (HORIZON + 1)).reshape(num, HORIZON + 1)
    reward = np.stack(rewards, axis=1)
    return Transitions(
        view="v1",
        environments=("toy",),
        obs_MV=np.stack(obs, axis=1).reshape(num * (HORIZON + 1), -1),
        mask_MT=mask,
        state_N=states[:, :-1].flatten(),
        next_N=states[:, 1:].flatten(),
        action_NA=np.stack(actions, axis=1).reshape(-1, ACTION_WIDTH),
        reward_N=reward.flatten(),
        discount_N=np.tile(np.arange(HORIZON) < HORIZON - 1, num).astype(np.float64),
        forced_N=is_forced(mask[states[:, :-1].flatten()]),
        env_seed_N=np.repeat(world.seed_N, HORIZON),
        environment_N=np.zeros(num * HORIZON, dtype=np.int64),
        episode_N=np.repeat(np.arange(num), HORIZON),
        return_N=np.repeat(reward.sum(axis=1), HORIZON),
        logp_N=np.full(num * HORIZON, np.nan),
        episode_M=np.repeat(np.arange(num), HORIZON + 1),
    )


def mean_return(transitions: Transitions) -> float:
    """Return the mean return of the episodes."""
    return float(transitions.reward_N.sum() / len(np.unique(transitions.episode_N)))


def join(parts: Sequence[Transitions]) -> Transitions:
    """Return the episodes of several plays as one data set."""
    states = np.cumsum([0, *(len(part.obs_MV) for part in parts)])
    episodes = np.cumsum([0, *(len(np.unique(part.episode_N)) for part in parts)])

    def all_of(name: str, shift: NDArray[np.integer] | None = None) -> NDArray[np.generic]:
        values = [getattr(part, name) for part in parts]
        return np.concatenate(values if shift is None else [v + s for v, s in zip(values, shift)])

    plain = ("action_NA", "reward_N", "discount_N", "forced_N", "env_seed_N", "environment_N", "return_N", "logp_N")
    return Transitions(
        view="v1",
        environments=("toy",),
        **{name: all_of(name) for name in ("obs_MV", "mask_MT", *plain)},
        **{name: all_of(name, states) for name in ("state_N", "next_N")},
        **{name: all_of(name, episodes) for name in ("episode_N", "episode_M")},
    )


def behaviour_data(episodes_each: int) -> tuple[Transitions, dict[str, float]]:
    """Return the data of the 33 behaviours, each on environment seeds of its own, and the mean return of each."""
    parts: dict[str, Transitions] = {}
    for name, policy in HEURISTICS.items():
        for epsilon in EPSILONS:
            first = FIRST_DATA_SEED + episodes_each * len(parts)
            seeds = list(range(first, first + episodes_each))
            parts[f"{name} {epsilon}"] = play(mixed(policy, epsilon, name), seeds)
    return join(list(parts.values())), {name: mean_return(part) for name, part in parts.items()}
