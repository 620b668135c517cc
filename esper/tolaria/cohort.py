"""The cohort: all episodes of one environment and one environment seed, run together.

Until an action changes the host, episodes are the same trajectory and are computed once; the never-act trajectory is
the trunk, always run to the end, so every episode carries its own control.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from esper.kasmina import lifecycle
from esper.kasmina.gates import GateReport, gate_g1, gate_g2, gate_g5
from esper.kasmina.lifecycle import SeedKey
from esper.leyline.actions import WAIT_ROW, Bools, Op, is_valid
from esper.leyline.errors import LifecycleError
from esper.leyline.identity import Root, extend_host_key
from esper.leyline.masks import build_mask
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.stages import BLENDED_STAGES, Stage
from esper.tolaria.cost import HostCosts, blueprint_costs, host_costs
from esper.tolaria.episode import Rider
from esper.tolaria.executor import Executor, SerialExecutor
from esper.tolaria.lineage import Lineage, Outcome
from esper.tolaria.observe import Matrix, as_columns, lever_rules, observe
from esper.tolaria.outcome import diverged_outcome, final_outcome
from esper.tolaria.roots import open_root, root_environment
from esper.tolaria.runtime import single_thread
from esper.tolaria.step_costs import count_costs, no_costs
from esper.tolaria.tasks import TaskData, load_task

Event = tuple[str | int | float, ...]

SNAPSHOT_EVERY_EPOCHS = 5


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of the actions of one step: carried out, or refused and by which check."""

    executed_K: Bools
    refused_by: list[str | None]


@dataclass(slots=True)
class _State:
    step: int
    lineages: dict[str, Lineage]
    riders: list[Rider]


class Cohort:
    """`reset()`, then `step(actions)` once per epoch until `done`.

    `step_costs` holds CPU seconds and operations of the last epoch.

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
        self.spec = spec
        self.env_seed = env_seed
        self.roots = tuple(roots)
        self.data: TaskData = load_task(spec.task)
        self.costs: dict[str, HostCosts] = {root: self._root_costs(root) for root in {*roots, Root.HOST.value}}
        self.executor = executor or SerialExecutor()
        self.keep_snapshots = keep_snapshots
        self.snapshots: dict[int, _State] = {}
        self.control_outcome: Outcome | None = None
        self.num_host_epochs = 0
        self.step_costs = no_costs(len(roots))
        self._state = _State(0, {}, [])
        self.trunk_key = ""

    def _root_costs(self, root: str) -> HostCosts:
        host = root_environment(self.spec, root).host
        return host_costs(host, self.data.in_channels, self.data.resolution, self.data.num_classes)

    @property
    def riders(self) -> list[Rider]:
        """The episodes, in order."""
        return self._state.riders

    @property
    def step_index(self) -> int:
        """Epochs run so far."""
        return self._state.step

    @property
    def trunk(self) -> Lineage:
        """The never-act trajectory."""
        return self._state.lineages[self.trunk_key]

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
        lineages: dict[str, Lineage] = {}
        opened = {}
        for root in dict.fromkeys((Root.HOST.value, *self.roots)):
            opened[root] = open_root(self.spec, self.env_seed, root, self.data)
            lineages[opened[root][0].host_key] = opened[root][0]
        self.trunk_key = opened[Root.HOST.value][0].host_key
        riders = [Rider(i, root, opened[root][0], list(opened[root][1])) for i, root in enumerate(self.roots)]
        self._state = _State(0, lineages, riders)
        self._snapshot()
        return self.observe()

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
        valid = is_valid(actions_KA, observation.mask_KT)
        applied = self._apply(actions_KA, valid)
        self._run_epoch()
        self._state.step += 1
        self.step_costs = count_costs(self.riders, self._state.lineages, self.costs)
        self._close_epoch()
        self._snapshot()
        return self.observe(), applied

    def _apply(self, actions_KA: NDArray[np.integer], valid_K: Bools) -> Applied:
        executed = np.zeros(len(self.riders), dtype=bool)
        refused: list[str | None] = [None] * len(self.riders)
        movers: dict[tuple[str, Event], list[tuple[Rider, int]]] = {}
        for rider, row, valid in zip(self.riders, actions_KA, valid_K):
            if rider.done:
                continue
            report = self._gate(rider, row) if valid else GateReport("mask", (), ("invalid_action",))
            executed[rider.index] = report.is_open
            refused[rider.index] = None if report.is_open else f"{report.gate}:{','.join(report.failed)}"
            event = self._event(rider, row) if report.is_open else None
            if event is not None:
                movers.setdefault((rider.lineage.host_key, event), []).append((rider, int(row[1])))
            elif report.is_open:
                self._quiet(rider, row)
            rider.last_op = int(row[0])
            rider.last_executed = bool(report.is_open)
            rider.submitted_rows.append(tuple(int(v) for v in row))
            rider.executed_rows.append(tuple(int(v) for v in (row if report.is_open else WAIT_ROW)))
        for (parent_key, event), moved in movers.items():
            self._fork(parent_key, event, moved)
        self._drop_unused()
        return Applied(executed_K=executed, refused_by=refused)

    def _gate(self, rider: Rider, row: NDArray[np.integer]) -> GateReport:
        op, index = Op(int(row[0])), int(row[1])
        if op is Op.GERMINATE:
            place = self.costs[rider.root].places[index]
            costs = blueprint_costs(int(row[2]), place.channels, place.resolution)
            budget = self.spec.param_budget
            fits = budget is None or rider.seed_params() + costs.num_params <= budget
            return gate_g1(rider.slots[index], shape_kept=costs.keeps_shape, within_budget=fits)
        if op is Op.ADVANCE:
            seed = rider.slots[index].seed
            module = rider.lineage.incubations[seed].module if seed is not None else None
            finite = module is not None and all(bool(torch.isfinite(p).all()) for p in module.parameters())
            return gate_g2(rider.slots[index], weights_finite=finite)
        if op is Op.FOSSILIZE:
            return gate_g5(rider.slots[index])
        return GateReport("none", (), ())

    def _event(self, rider: Rider, row: NDArray[np.integer]) -> Event | None:
        """The host-changing event that an action is, or None."""
        op, index = Op(int(row[0])), int(row[1])
        if op in (Op.WAIT, Op.GERMINATE):
            return None
        slot = rider.slots[index]
        if op is Op.ADVANCE and slot.seed is not None:
            return ("blend", self.step_index, *slot.seed.parts(), slot.blend, slot.tempo, slot.isolation)
        if op is Op.FOSSILIZE:
            return ("fossilize", self.step_index, index)
        return ("prune", self.step_index, index) if slot.stage in BLENDED_STAGES else None

    def _quiet(self, rider: Rider, row: NDArray[np.integer]) -> None:
        """Carry out an action that leaves the host alone."""
        op, index = Op(int(row[0])), int(row[1])
        if op is Op.GERMINATE:
            accuracy = rider.lineage.history[-1].val_accuracy
            seed = SeedKey(index, int(row[2]), int(row[7]), self.step_index, self.spec.incubation)
            levers = (int(row[3]), int(row[4]), int(row[5]), int(row[6]))
            rider.slots[index] = lifecycle.germinate(rider.slots[index], seed, levers, accuracy)
            rider.lineage.incubate(seed, self.env_seed, self.costs[rider.root].places[index].channels)
        elif op is Op.PRUNE:
            rider.slots[index] = lifecycle.prune(rider.slots[index])

    def _fork(self, parent_key: str, event: Event, moved: list[tuple[Rider, int]]) -> None:
        """Move riders whose action is the same host-changing event onto a new lineage."""
        parent = self._state.lineages[parent_key]
        keep = {key for rider, _ in moved for key in rider.incubating()}
        child = parent.fork(extend_host_key(parent_key, event), keep)
        self._state.lineages[child.host_key] = child
        accuracy = parent.history[-1].val_accuracy
        first, index = moved[0]
        if event[0] == "blend":
            child.blend_in(first.slots[index])
        elif event[0] == "fossilize":
            child.commit(index)
        else:
            child.remove(index)
        for rider, slot in moved:
            rider.lineage = child
            state = rider.slots[slot]
            if event[0] == "blend":
                rider.slots[slot] = lifecycle.advance(state, accuracy)
            elif event[0] == "fossilize":
                rider.slots[slot] = lifecycle.fossilize(state, accuracy)
            else:
                rider.slots[slot] = lifecycle.prune(state)

    def _drop_unused(self) -> None:
        """Forget lineages without riders (never the trunk) and incubations that no rider needs."""
        needed: dict[str, set[SeedKey]] = {self.trunk_key: set()}
        for rider in self.riders:
            if not rider.done:
                needed.setdefault(rider.lineage.host_key, set()).update(rider.incubating())
        lineages = self._state.lineages
        self._state.lineages = {key: lineages[key] for key in lineages if key in needed}
        for key, lineage in self._state.lineages.items():
            lineage.incubations = {s: v for s, v in lineage.incubations.items() if s in needed[key]}

    def _run_epoch(self) -> None:
        running = [lineage for lineage in self._state.lineages.values() if not lineage.diverged]
        self.executor.run_epoch(running, self.data, self.env_seed, self.step_index)
        self.num_host_epochs += len(running)

    def _close_epoch(self) -> None:
        """Move the lives of seeds on and end episodes whose host diverged or whose budget is spent."""
        last = self.step_index >= self.spec.horizon
        for rider in self.riders:
            if not rider.done:
                accuracy = rider.lineage.history[-1].val_accuracy
                rider.slots = [lifecycle.tick(slot, accuracy) for slot in rider.slots]
                rider.num_steps += 1
        self._expire_holding()
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

    def _expire_holding(self) -> None:
        """Prune seeds that were held longer than the environment's patience: a host-changing event."""
        patience = self.spec.holding_patience
        if patience is None:
            return
        for index in range(self.spec.host.num_slots):
            movers: dict[str, list[tuple[Rider, int]]] = {}
            for rider in self.riders:
                state = rider.slots[index]
                if not rider.done and state.stage is Stage.HOLDING and state.epochs_in_stage >= patience:
                    movers.setdefault(rider.lineage.host_key, []).append((rider, index))
            for parent_key, moved in movers.items():
                self._fork(parent_key, ("expire", self.step_index, index), moved)
        self._drop_unused()

    def _extra_params(self, rider: Rider) -> int:
        return self.costs[rider.root].num_params - self.base_params

    def _snapshot(self) -> None:
        if self.keep_snapshots and self.step_index % SNAPSHOT_EVERY_EPOCHS == 0:
            self.snapshots[self.step_index] = copy.deepcopy(self._state, {id(self.spec): self.spec})

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
        state = copy.deepcopy(self.snapshots[nearest], {id(self.spec): self.spec})
        child = Cohort(self.spec, self.env_seed, [self.roots[episode]], self.executor)
        rider = state.riders[episode]
        rider.index = 0
        lineages = {self.trunk_key: state.lineages[self.trunk_key], rider.lineage.host_key: rider.lineage}
        child.trunk_key = self.trunk_key
        child._state = _State(state.step, lineages, [rider])
        return child
