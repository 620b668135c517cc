"""The cohort: all episodes of one environment and one environment seed, run together.

Until an action changes the host, episodes are the same trajectory and are computed once; the never-act trajectory is
the trunk, always run to the end, so every episode carries its own control.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.kasmina import lifecycle
from esper.leyline.actions import Bools, is_valid
from esper.leyline.errors import LifecycleError
from esper.leyline.identity import Root
from esper.leyline.masks import build_mask
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.cost import HostCosts, host_costs
from esper.tolaria.episode import Rider
from esper.tolaria.executor import Executor, SerialExecutor
from esper.tolaria.governor import SNAPSHOT_EVERY_EPOCHS, Intervention, govern, remember_where_due
from esper.tolaria.lineage import Lineage, Outcome
from esper.tolaria.observe import Matrix, as_columns, lever_rules, observe
from esper.tolaria.outcome import diverged_outcome, final_outcome
from esper.tolaria.roots import open_root, root_environment
from esper.tolaria.runtime import declared_numerics, keep_freed_memory, single_thread, slot_device
from esper.tolaria.step_costs import count_costs, no_costs
from esper.tolaria.tasks import TaskData, load_task
from esper.tolaria.transitions import Applied, Flock, apply_actions, expire_holding


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What all riders see after `step` epochs.

    Attributes:
        step: Epochs run.
        matrix: Feature columns in registry order, float64 [K, features].
        mask_KT: Action masks, bool [K, TREE_WIDTH].
        done_K: Episodes that have ended.
    """

    step: int
    matrix: Matrix
    mask_KT: Bools
    done_K: Bools


class Cohort:
    """`reset()`, then `step(actions)` once per epoch until `done`.

    `step_costs` holds CPU seconds and operations of the last epoch, `interventions` what the governor did after it.

    Args:
        spec: The environment.
        env_seed: Its seed: initial weights, data order and seed initialisation.
        roots: The root of each episode; its length is the number of episodes K.
        executor: What runs the epochs.
        keep_snapshots: Keep the state at every fifth epoch, which `branch` starts from.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        env_seed: int,
        roots: Sequence[str],
        executor: Executor | None = None,
        keep_snapshots: bool = False,
    ) -> None:
        single_thread()
        keep_freed_memory()
        self.spec = spec
        self.env_seed = env_seed
        self.roots = tuple(roots)
        self.device = slot_device()
        self.data: TaskData = self._load()
        self.costs: dict[str, HostCosts] = {root: self._root_costs(root) for root in {*roots, Root.HOST.value}}
        self.executor = executor or SerialExecutor()
        self.keep_snapshots = keep_snapshots
        self.snapshots: dict[int, Flock] = {}
        self.control_outcome: Outcome | None = None
        self.num_host_epochs = 0
        self.step_costs = no_costs(len(roots))
        self.interventions: list[Intervention] = []
        self._flock = self._new_flock("", {}, [])

    def _load(self) -> TaskData:
        return load_task(self.spec.task, self.device)

    def _open(self, root: str) -> tuple[Lineage, list[lifecycle.SlotState]]:
        """The lineage of a root, validated, and the slots that a rider starts with."""
        return open_root(self.spec, self.env_seed, root, self.data)

    def _new_flock(self, trunk_key: str, lineages: dict[str, Lineage], riders: list[Rider]) -> Flock:
        return Flock(
            spec=self.spec,
            env_seed=self.env_seed,
            costs=self.costs,
            step=0,
            trunk_key=trunk_key,
            lineages=lineages,
            riders=riders,
        )

    def _copy(self, flock: Flock) -> Flock:
        """Return a deep copy that shares what never changes."""
        return copy.deepcopy(flock, {id(self.spec): self.spec, id(self.costs): self.costs})

    def _root_costs(self, root: str) -> HostCosts:
        host = root_environment(self.spec, root).host
        return host_costs(host, self.data.shape)

    @property
    def flock(self) -> Flock:
        """Its riders and their lineages."""
        return self._flock

    @property
    def riders(self) -> list[Rider]:
        """The episodes, in order."""
        return self._flock.riders

    @property
    def step_index(self) -> int:
        """Epochs run so far."""
        return self._flock.step

    @property
    def trunk(self) -> Lineage:
        """The never-act trajectory."""
        return self._flock.trunk

    @property
    def base_params(self) -> int:
        """Parameters of the environment's own host."""
        return self.costs[Root.HOST.value].num_params

    @property
    def done(self) -> bool:
        """Whether every episode and the trunk have ended."""
        return self.step_index >= self.spec.horizon

    def reset(self) -> Observation:
        """Initialise and validate every root; return observation 0."""
        with declared_numerics(self.spec.numerics, self.device):
            return self._reset()

    def _reset(self) -> Observation:
        lineages: dict[str, Lineage] = {}
        opened = {}
        for root in dict.fromkeys((Root.HOST.value, *self.roots)):
            opened[root] = self._open(root)
            lineages[opened[root][0].host_key] = opened[root][0]
        trunk_key = opened[Root.HOST.value][0].host_key
        riders = [Rider(i, root, opened[root][0], list(opened[root][1])) for i, root in enumerate(self.roots)]
        self._flock = self._new_flock(trunk_key, lineages, riders)
        self.interventions = []
        remember_where_due(self._flock, self.data, set())
        self._snapshot()
        return self.observe()

    def resume(self, flock: Flock, snapshots: dict[int, Flock]) -> None:
        """Go on from a state that was stored, with the states that it can branch from."""
        self._flock = flock
        self.snapshots = snapshots

    def observe(self) -> Observation:
        """Return what the riders see now."""
        matrix = observe(self.riders, self.step_index, self.base_params, self.costs)
        columns = as_columns(matrix)
        mask = np.zeros((0, 0), dtype=bool)
        for root in dict.fromkeys(self.roots):
            rows = np.array([rider.root == root for rider in self.riders])
            rules = lever_rules(self.spec, self.costs[root])
            part = build_mask({name: values[rows] for name, values in columns.items()}, rules)
            if mask.size == 0:
                mask = np.zeros((len(self.riders), part.shape[1]), dtype=bool)
            mask[rows] = part
        ended = np.array([rider.done for rider in self.riders], dtype=bool)
        return Observation(step=self.step_index, matrix=matrix, mask_KT=mask, done_K=ended)

    def step(self, actions_KA: NDArray[np.integer], observation: Observation) -> tuple[Observation, Applied]:
        """Apply one action per episode, run one epoch, return the next observation and what was carried out.

        Args:
            actions_KA: Int [K, 8]; rows of ended episodes are ignored, an invalid action is refused.
            observation: The current one, whose mask decides what is valid.
        """
        if self.done:
            raise LifecycleError(f"step {self.step_index} is past the horizon of {self.spec.horizon}\n  call reset()")
        with declared_numerics(self.spec.numerics, self.device):
            return self._step(actions_KA, observation)

    def _step(self, actions_KA: NDArray[np.integer], observation: Observation) -> tuple[Observation, Applied]:
        valid = is_valid(actions_KA, observation.mask_KT)
        known = set(self._flock.lineages)
        applied = apply_actions(self._flock, actions_KA, valid)
        remember_where_due(self._flock, self.data, known)
        self._run_epoch()
        self._flock.step += 1
        self.step_costs = count_costs(self.riders, self._flock.lineages, self.costs)
        self._close_epoch()
        self._snapshot()
        return self.observe(), applied

    def _run_epoch(self) -> None:
        running = [lineage for lineage in self._flock.lineages.values() if not lineage.diverged]
        self.executor.run_epoch(running, self.data, self.env_seed, self.step_index)
        self.num_host_epochs += len(running)

    def _close_epoch(self) -> None:
        """Move the lives of seeds on, let the governor look at every host, end episodes that diverged or are over."""
        for rider in self.riders:
            if not rider.done:
                accuracy = rider.lineage.history[-1].val_accuracy
                asks = self.spec.ask_at_every_gate
                rider.slots = [lifecycle.tick(slot, accuracy, ask_at_every_gate=asks) for slot in rider.slots]
                rider.num_steps += 1
        self.interventions = govern(self._flock, self.data)
        known = set(self._flock.lineages)
        expire_holding(self._flock)
        remember_where_due(self._flock, self.data, known, at_end_of_epoch=True)
        self._end_episodes()

    def _end_episodes(self) -> None:
        last = self.step_index >= self.spec.horizon
        for rider in self.riders:
            if rider.done:
                continue
            if rider.lineage.diverged:
                rider.done = rider.diverged = True
                rider.outcome = diverged_outcome(rider.lineage, self._extra_params(rider), self.data)
            elif last:
                rider.done = True
                rider.outcome = final_outcome(rider.lineage, self._extra_params(rider), self.data)
        if last:
            trunk = self.trunk
            ending = diverged_outcome if trunk.diverged else final_outcome
            self.control_outcome = ending(trunk, 0, self.data)

    def _extra_params(self, rider: Rider) -> int:
        return self.costs[rider.root].num_params - self.base_params

    def _snapshot(self) -> None:
        if self.keep_snapshots and self.step_index % SNAPSHOT_EVERY_EPOCHS == 0:
            self.snapshots[self.step_index] = self._copy(self._flock)

    def branch(self, episode: int, step: int) -> Cohort:
        """Return a cohort of that one episode, restored from the nearest snapshot at or before `step`.

        Its `step_index` says where it stands; replaying the episode's submitted actions from there leads to the very
        same state at `step`. This cohort is left as it is.

        Raises:
            LifecycleError: There are no snapshots, or the episode never reached the step.
        """
        parent = self.riders[episode]
        if not self.snapshots:
            raise LifecycleError("the cohort keeps no snapshots to branch from\n  use Cohort(..., keep_snapshots=True)")
        if not 0 <= step < parent.num_steps:
            raise LifecycleError(f"cannot branch at step {step}: the episode has decisions 0 to {parent.num_steps - 1}")
        nearest = max(known for known in self.snapshots if known <= step)
        state = self._copy(self.snapshots[nearest])
        child = type(self)(self.spec, self.env_seed, [self.roots[episode]], self.executor)
        rider = state.riders[episode]
        rider.index = 0
        state.lineages = {state.trunk_key: state.trunk, rider.lineage.host_key: rider.lineage}
        state.riders = [rider]
        child._flock = state
        return child
