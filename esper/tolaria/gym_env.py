"""Thin Gymnasium adaptors of the cohort: one episode (`GrowthEnv`), or the episodes of a cohort (`GrowthVectorEnv`).

Observations are view v4, actions the eight columns of the tree, rewards those of a reward spec (left out, the one that
ships for the environment, or for its family, or the plain one). The action mask is in
`info["action_mask"]`; an invalid action becomes WAIT and `info["executed"]` is false. The epoch budget is a
termination, never a truncation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from esper.leyline.actions import LEVER_SIZES, MAX_SLOTS, NUM_OPS, canonicalise
from esper.leyline.identity import SELECTION_START, Root, env_seed
from esper.leyline.library import load, load_environment, load_reward_of
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.rewards import EpisodeColumns, RewardSpec, combine, reward_components
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.views import V4
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.observe import as_columns

Info = dict[str, Any]
Floats = NDArray[np.float32]

_VAL = FEATURE_COLUMNS.index("val_accuracy")
_SEED_PARAMS = FEATURE_COLUMNS.index("seed_params")


def _specs(environment: str | EnvironmentSpec, reward: str | RewardSpec | None) -> tuple[EnvironmentSpec, RewardSpec]:
    env = load_environment(environment) if isinstance(environment, str) else environment
    if reward is None:
        return env, load_reward_of(env.name)
    return env, load("rewards", reward, RewardSpec) if isinstance(reward, str) else reward


class _Session:
    """A cohort seen through a view, with rewards as it goes."""

    def __init__(self, environment: EnvironmentSpec, reward: RewardSpec, num_episodes: int) -> None:
        self.environment, self.reward = environment, reward
        self.num_episodes = num_episodes

    def reset(self, replicate: int) -> tuple[Floats, Info]:
        """Start the cohort of a replicate."""
        seed = env_seed(self.environment.task.task_id, replicate)
        self.cohort = Cohort(self.environment, seed, [Root.HOST.value] * self.num_episodes)
        self.observation = self.cohort.reset()
        self.executed = np.zeros(self.num_episodes, dtype=bool)
        return self._view(), self._info()

    def step(self, actions_KA: NDArray[np.integer]) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_], Info]:
        """Run one epoch; returns observation, rewards, which episodes have ended, and infos."""
        before, control_before = self.observation, self._control_accuracy()
        was_done = before.done_K.copy()
        self.observation, applied = self.cohort.step(canonicalise(actions_KA), before)
        self.executed = applied.executed_K
        rewards = [0.0 if was_done[k] else self._reward(k, before, control_before) for k in range(self.num_episodes)]
        return self._view(), np.array(rewards), self.observation.done_K, self._info()

    def _control_accuracy(self) -> float:
        trunk = self.cohort.trunk
        return float(np.float32(self.cohort.data.chance if trunk.diverged else trunk.history[-1].val_accuracy))

    def _reward(self, k: int, before: Observation, control_before: float) -> float:
        rider, control = self.cohort.riders[k], self.cohort.control_outcome
        pair = np.stack([before.matrix[k], self.observation.matrix[k]])
        control_now = self._control_accuracy()
        ended = rider.outcome
        final = float(pair[1, _VAL]) if ended is None else ended.final_val_accuracy
        columns = EpisodeColumns(
            val_accuracy=pair[:, _VAL].copy(),
            control_val_accuracy=np.array([control_before, control_now]),
            seed_params=pair[:, _SEED_PARAMS].copy(),
            host_params=self.cohort.base_params,
            final_val_accuracy=final,
            control_final_val_accuracy=control.final_val_accuracy if control and ended else control_now,
            final_seed_params=float(pair[1, _SEED_PARAMS]) if ended is None else ended.seed_params,
        )
        return float(combine(self.reward.model_copy(update={"mode": "gain"}), *reward_components(columns))[0])

    def _view(self) -> Floats:
        steps = np.full(self.num_episodes, self.observation.step)
        return V4.encode(as_columns(self.observation.matrix), steps)

    def _info(self) -> Info:
        trunk = self.cohort.trunk
        valid = np.full(self.num_episodes, not (trunk.diverged or trunk.num_rollbacks))
        return {"action_mask": self.observation.mask_KT, "executed": self.executed, "control_valid": valid}


def _spaces() -> tuple[spaces.Box, spaces.MultiDiscrete]:
    box = spaces.Box(-np.inf, np.inf, shape=(V4.width,), dtype=np.float32)
    return box, spaces.MultiDiscrete([NUM_OPS, MAX_SLOTS, *LEVER_SIZES])


def _replicate(seed: int | None, rng: np.random.Generator) -> int:
    """Seeds are replicates; those of selection and evaluation are out of reach."""
    return int(rng.integers(SELECTION_START)) if seed is None else seed % SELECTION_START


class GrowthEnv(gymnasium.Env[Floats, NDArray[np.int64]]):  # type: ignore[misc]
    """One episode; `reset(seed=n)` is replicate n of the task."""

    metadata: ClassVar[dict[str, list[str]]] = {"render_modes": []}

    def __init__(self, environment: str | EnvironmentSpec = "digits-gap", reward: str | RewardSpec | None = None):
        self._session = _Session(*_specs(environment, reward), num_episodes=1)
        self.observation_space, self.action_space = _spaces()

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Floats, Info]:
        """Start an episode."""
        super().reset(seed=seed)
        observation, info = self._session.reset(_replicate(seed, self.np_random))
        return observation[0], {name: values[0] for name, values in info.items()}

    def step(self, action: NDArray[np.int64]) -> tuple[Floats, float, bool, bool, Info]:
        """Run one epoch."""
        observation, rewards, done, info = self._session.step(np.asarray(action)[None])
        first = {name: values[0] for name, values in info.items()}
        return observation[0], float(rewards[0]), bool(done[0]), False, first


class GrowthVectorEnv(gymnasium.vector.VectorEnv[Floats, NDArray[np.int64], NDArray[np.float64]]):  # type: ignore[misc]
    """The episodes of one cohort at a time: same initial weights, same data order, shared until they differ.

    An episode that ends before the others (a diverged host) stays ended, with reward 0, until the cohort does; the
    step after that begins the next cohort.
    """

    def __init__(
        self,
        num_envs: int = 1,
        environment: str | EnvironmentSpec = "digits-gap",
        reward: str | RewardSpec | None = None,
    ) -> None:
        self.num_envs = num_envs
        self._session = _Session(*_specs(environment, reward), num_episodes=num_envs)
        self.single_observation_space, self.single_action_space = _spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Floats, Info]:
        """Start a cohort."""
        super().reset(seed=seed)
        return self._session.reset(_replicate(seed, self.np_random))

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Run one epoch, or begin the next cohort where the last one has ended."""
        never = np.zeros(self.num_envs, dtype=bool)
        if self._session.cohort.done:
            observation, info = self.reset()
            return observation, np.zeros(self.num_envs), never, never, info
        observation, rewards, done, info = self._session.step(np.asarray(actions))
        return observation, rewards, done.copy(), never, info
