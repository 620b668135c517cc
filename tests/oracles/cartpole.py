"""Offline CartPole: 200 episodes of five rules with four shares of random actions, mostly bad, 87 steps on average."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
from oracles.flat_tree import flat_transitions

from esper.leyline.keys import derive_seed, numpy_generator
from esper.simic.batches import Transitions

Rule = Callable[[np.ndarray, int], bool]

RULES: dict[str, Rule] = {
    "balance": lambda obs, step: bool(obs[2] + 0.1 * obs[3] > 0),
    "angle": lambda obs, step: bool(obs[2] > 0),
    "velocity": lambda obs, step: bool(obs[1] < 0),
    "rate leaning left": lambda obs, step: bool(obs[3] > -0.2),
    "rate leaning right": lambda obs, step: bool(obs[3] > 0.2),
}
"""What is observed (position, velocity, angle, angular velocity) -> push right. The first balances for 500 steps, the
others fall within 50; the last two contradict each other and the first where it balances."""

EPSILONS = (0.1, 0.3, 0.6, 1.0)
EPISODES_OF_EACH = 10


def mixed_episodes() -> Transitions:
    """The data set; actions 0 (left) and 1 (right) are WAIT and GERMINATE."""
    env = gymnasium.make("CartPole-v1")
    episodes = []
    for name, rule in RULES.items():
        for epsilon in EPSILONS:
            for repetition in range(EPISODES_OF_EACH):
                key = ("cartpole", name, epsilon, repetition)
                episodes.append(_episode(env, rule, epsilon, derive_seed(*key) % 2**31, numpy_generator(*key)))
    return flat_transitions(episodes, num_actions=2)


def _episode(
    env: gymnasium.Env, rule: Rule, epsilon: float, seed: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    seen, ids, rewards = [env.reset(seed=seed)[0]], [], []
    while True:
        explores = rng.random() < epsilon
        ids.append(int(rng.integers(2)) if explores else int(rule(seen[-1], len(ids))))
        obs, reward, terminated, truncated, _ = env.step(ids[-1])
        seen.append(obs)
        rewards.append(float(reward))
        if terminated or truncated:
            return np.array(seen), np.array(ids), np.array(rewards), terminated


def evaluate(act: Callable[[np.ndarray], np.ndarray], num_episodes: int = 50) -> float:
    """Mean return of a policy (observations [N, 4] to action ids [N]) on starts that no data episode had."""
    envs = [gymnasium.make("CartPole-v1") for _ in range(num_episodes)]
    obs = np.stack([env.reset(seed=derive_seed("cartpole test", i) % 2**31)[0] for i, env in enumerate(envs)])
    live = np.ones(num_episodes, dtype=bool)
    total = np.zeros(num_episodes)
    while live.any():
        rows = np.flatnonzero(live)
        for row, action in zip(rows, act(obs[rows].astype(np.float32))):
            obs[row], reward, terminated, truncated, _ = envs[row].step(int(action))
            total[row] += float(reward)
            live[row] = not (terminated or truncated)
    return float(total.mean())
