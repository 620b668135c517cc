"""Made-up cohorts: the real engine without a host to train.

Behaviours, masks, gates, lifecycles, keys, rewards and rows are the engine's own. Accuracies and what is measured of
seeds come from formulas and keyed noise instead of training: equal plans give equal rows, but no number in them means
anything. Thousands of episodes take seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from esper.karn.kinds import SKELETON_SOURCE
from esper.kasmina.gating import gate_params
from esper.kasmina.hosts import DataShape, SlotPlace, build_host
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.kasmina.network import Graft
from esper.leyline.actions import Blend
from esper.leyline.errors import SpecError
from esper.leyline.host_specs import HostSpec
from esper.leyline.identity import Root, root_host_key
from esper.leyline.keys import hex_digest, numpy_generator
from esper.leyline.matrix import CohortPlan
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.task_specs import ImagesTask, TaskSpec
from esper.tolaria.cohort import Cohort, Observation
from esper.tolaria.cost import blueprint_costs
from esper.tolaria.lineage import MILESTONES, NAN, BlendedSeed, EpochMetrics, Incubation, Lineage, Outcome, SeedMeasures
from esper.tolaria.memory import task_shape
from esper.tolaria.rollout import run_cohort
from esper.tolaria.tasks import Split, TaskData
from esper.tolaria.transitions import Applied
from flows.host_operations import IMAGE_CLASSES

NOISE_POINTS = 0.4
"""Standard deviation of a validation accuracy around its curve."""

EPOCH_S, SEED_S = 0.02, 0.005
"""Seconds that a host epoch and an incubating seed are said to have cost."""

WORTH_POINTS = (-1.0, 8.0)
"""What a seed at full alpha is worth, drawn by environment, slot and blueprint."""


def skeleton_cohort(plan: CohortPlan) -> dict[str, pa.Table]:
    """Make a cohort up, branches included; returns the tables that `run_cohort` would (an `Engine` of the pool)."""
    return run_cohort(plan, kind=SkeletonCohort)


class SkeletonCohort(Cohort):
    """A cohort that reads no data and trains nothing."""

    def __init__(
        self,
        spec: EnvironmentSpec,
        env_seed: int,
        roots: Sequence[str],
        executor: object = None,
        keep_snapshots: bool = False,
    ) -> None:
        super().__init__(spec, env_seed, roots, SkeletonExecutor(), keep_snapshots)

    def _load(self) -> TaskData:
        return _no_data(self.spec.task)

    def _open(self, root: str) -> tuple[Lineage, list[SlotState]]:
        if root != Root.HOST.value:
            raise SpecError(f"a skeleton cannot start from root {root!r}\n  expected: host, as matrices plan it")
        host_key = root_host_key(self.spec.spec_id, self.env_seed, root)
        lineage = GhostLineage(host_key, self.spec, self.env_seed, self.data)
        lineage.record(lineage.validated())
        return lineage, [SlotState() for _ in range(self.spec.host.num_slots)]

    def reset(self) -> Observation:
        """Return observation 0; numerics have no part in it."""
        return self._reset()

    def step(self, actions_KA: np.ndarray, observation: Observation) -> tuple[Observation, Applied]:
        """Apply one action per episode and make an epoch up."""
        return self._step(actions_KA, observation)


@lru_cache(maxsize=64)
def _no_data(task: TaskSpec) -> TaskData:
    """A task's shape without its rows; images of the user's own count as having ten classes."""
    if isinstance(task, ImagesTask):
        shape = DataShape(kind="image", channels=3, resolution=task.resolution, num_classes=IMAGE_CLASSES)
    else:
        shape = task_shape(task)
    empty = Split(inputs=torch.zeros(0), labels=torch.zeros(0))
    return TaskData(
        train=empty,
        val=empty,
        val_epoch=empty,
        test=empty,
        shape=shape,
        source=SKELETON_SOURCE,
        digest=hex_digest([SKELETON_SOURCE, task.task_id], 16),
        chance=1 / shape.num_classes,
    )


class _NoWeights(nn.Module):
    """Stands where a seed's module would; copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class _GhostHost:
    """What the engine asks of a host: its places and depth; it has no weights."""

    places: tuple[SlotPlace, ...]
    depth: int

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


@lru_cache(maxsize=64)
def _ghost_host(host: HostSpec, shape: DataShape) -> _GhostHost:
    with torch.device("meta"):
        built = build_host(host, shape)
    return _GhostHost(tuple(built.places), built.depth)


_NO_MODULE = _NoWeights()


def _no_optimiser() -> Any:
    return SimpleNamespace(state={}, param_groups=[])


class GhostLineage(Lineage):
    """A lineage whose network is a list of grafts, and whose accuracies are a formula."""

    def __init__(self, host_key: str, spec: EnvironmentSpec, env_seed: int, data: TaskData) -> None:
        # not the parent's own: it takes the weights of a network
        self.host_key = host_key
        self.spec = spec
        self.env_seed = env_seed
        self.chance = data.chance
        self.network: Any = SimpleNamespace(host=_ghost_host(spec.host, data.shape), grafts={})
        self.optimiser = _no_optimiser()
        self.seeds = {}
        self.incubations = {}
        self.history = []
        self.plateau_epochs = self.num_rollbacks = 0
        self.non_finite = self.diverged = False
        self.lr_scale, self.peak_train_accuracy = 1.0, 0.0
        self.good = None
        self.host_weight_change = self.removal_cost_all = NAN
        self.cpu_s = 0.0
        self.curve = _curve(spec, env_seed, data.chance)

    @property
    def outcome(self) -> Outcome:  # type: ignore[override]
        """The accuracies of the committed and of the uncommitted network, as they would be now."""
        fossils = [slot for slot, graft in self.network.grafts.items() if graft.fossil]
        noise = NOISE_POINTS / 4 * self._noise("end", len(self.history)).standard_normal(2)
        committed = np.clip(self._accuracy(fossils) + noise / 100, 0, 1)
        whole = np.clip(self._accuracy(list(self.network.grafts)) + noise / 100, 0, 1)
        return Outcome(
            final_val_accuracy=float(committed[0]),
            final_test_accuracy=float(committed[1]),
            uncommitted_val_accuracy=float(whole[0]),
            uncommitted_test_accuracy=float(whole[1]),
            seed_params=sum(self.seeds[slot].num_params for slot in fossils),
            num_fossils=len(fossils),
        )

    def fork(self, host_key: str, keep: set[SeedKey]) -> Lineage:
        """Return a copy under a new key, with the incubations in `keep`; what never changes is shared."""
        child = copy.copy(self)
        child.host_key = host_key
        child.history = list(self.history)
        grafts = {slot: replace(graft) for slot, graft in self.network.grafts.items()}
        child.network = SimpleNamespace(host=self.network.host, grafts=grafts)
        child.seeds = {slot: replace(seed, measures=replace(seed.measures)) for slot, seed in self.seeds.items()}
        child.incubations = {key: copy.copy(value) for key, value in self.incubations.items() if key in keep}
        return child

    def incubate(self, key: SeedKey, env_seed: int, channels: int) -> Incubation:
        """Return the incubation of a seed key, begun now if it is not there yet."""
        if key not in self.incubations:
            place = self.network.host.places[key.slot]
            costs = blueprint_costs(self.spec.host.topology, key.blueprint, place.channels, place.resolution)
            self.incubations[key] = Incubation(key, _NO_MODULE, _no_optimiser(), costs.num_params)
        return self.incubations[key]

    def blend_in(self, slot: SlotState, env_seed: int) -> None:
        """Make an incubating seed part of the host."""
        if slot.seed is None:
            raise ValueError("an empty slot cannot be blended in")
        incubation, index = self.incubations.pop(slot.seed), slot.seed.slot
        gate = gate_params(self.network.host.places[index].channels) if slot.blend_kind is Blend.GATED else 0
        self.network.grafts[index] = Graft(_NO_MODULE, 0.0, slot.isolated, fossil=False)
        num_params = incubation.num_params + gate
        seed = BlendedSeed(slot.seed, slot.blend_kind, slot.tempo_epochs, num_params, measures=incubation.measures)
        self.seeds[index] = seed

    def validated(self) -> EpochMetrics:
        """Return the made-up metrics of the epochs run so far; training is measured from the first epoch on."""
        epoch = len(self.history)
        noise = self._noise("epoch", epoch).standard_normal(2) * NOISE_POINTS / 100
        accuracy = float(np.float32(np.clip(self._accuracy(list(self.network.grafts)) + noise[0], 0, 1)))
        trained = min(1.0, accuracy + 0.02 + abs(float(noise[1])))
        top = -math.log(self.chance)
        return EpochMetrics(
            train_loss=top * (1.05 - trained) if epoch else NAN,
            train_accuracy=trained if epoch else NAN,
            val_loss=top * (1.1 - accuracy),
            val_accuracy=accuracy,
        )

    def measure(self) -> None:
        """Make up what is measured of every seed after an epoch."""
        epoch = len(self.history)
        for key, incubation in self.incubations.items():
            if key.has_started:
                incubation.measures = self._incubating(key, incubation.measures, epoch)
                incubation.cpu_s = SEED_S
        costs = []
        for slot, seed in sorted(self.seeds.items()):
            seed.measures = self._blended(slot, seed, epoch)
            if not self.network.grafts[slot].fossil:
                costs.append(seed.measures.removal_cost)
        self.removal_cost_all = sum(costs) if costs else NAN
        self.host_weight_change = 0.3 / (1 + epoch) * (1 + 0.1 * float(self._noise("change", epoch).random()))
        self.cpu_s = EPOCH_S

    def _incubating(self, key: SeedKey, before: SeedMeasures, epoch: int) -> SeedMeasures:
        age = 1 + epoch - key.birth_epoch
        noise = self._noise(key.slot, key.blueprint, key.seed_lr, key.birth_epoch, epoch).standard_normal(2)
        promise = self._worth(key.slot, key.blueprint) * (1 - math.exp(-age / 3)) / 2
        measures = _gradients(before, age, noise)
        measures.seed_improvement = promise + NOISE_POINTS * float(noise[0])
        measures.val_loss_drop = measures.seed_improvement / 50
        measures.train_loss_drop = promise / 40
        return measures

    def _blended(self, slot: int, seed: BlendedSeed, epoch: int) -> SeedMeasures:
        graft = self.network.grafts[slot]
        noise = self._noise("blended", slot, epoch).standard_normal(2)
        measures = _gradients(seed.measures, 1 + epoch - seed.key.birth_epoch, noise)
        cost = self._worth(slot, seed.key.blueprint) * graft.alpha + NOISE_POINTS * float(noise[0])
        measures.removal_cost_velocity = cost - seed.measures.removal_cost
        measures.removal_cost = cost
        measures.gradient_through_seed = 0.0 if graft.isolated else 0.1 * graft.alpha
        measures.contributions = [
            cost if graft.alpha >= share and math.isnan(kept) else kept
            for share, kept in zip(MILESTONES, seed.measures.contributions, strict=True)
        ]
        return measures

    def _accuracy(self, slots: Sequence[int]) -> float:
        """The accuracy, a fraction, of the host with the grafts in some slots."""
        start, rise, epochs = self.curve
        run = self.spec.warm_start_epochs + len(self.history)
        host = start + rise * (1 - math.exp(-run / epochs))
        grafts = self.network.grafts
        points = sum(float(grafts[slot].alpha) * self._worth(slot, self.seeds[slot].key.blueprint) for slot in slots)
        return host + points / 100

    def _worth(self, slot: int, blueprint: int) -> float:
        return _worth(self.spec.name, slot, blueprint)

    def _noise(self, *key: str | int) -> np.random.Generator:
        return numpy_generator(self.env_seed, SKELETON_SOURCE, self.host_key, *key)


class SkeletonExecutor:
    """Makes one epoch of every lineage up."""

    def run_epoch(self, lineages: Sequence[Lineage], data: TaskData, env_seed: int, epoch: int) -> None:
        """Set metrics, measures and seconds of the epoch."""
        for lineage in lineages:
            if not isinstance(lineage, GhostLineage):
                raise TypeError(f"a skeleton runs ghosts alone, not {type(lineage).__name__}")
            lineage.begin_epoch(epoch)
            lineage.record(lineage.validated())
            lineage.measure()


def _gradients(before: SeedMeasures, age: int, noise: np.ndarray) -> SeedMeasures:
    """The gradient's measures of a seed after another epoch; those of an accuracy are unmeasured yet."""
    norm = float(np.exp(0.2 * noise[1])) / math.sqrt(age)
    return SeedMeasures(
        gradient_norm=norm,
        gradient_health=1 / (1 + norm),
        gradient_health_previous=before.gradient_health,
        gradient_vanishing=0.0,
        gradient_exploding=0.0,
        gradient_ratio=0.5 * norm,
        gradient_variation=0.5 / age if age > 2 else NAN,
        stable_share=1 - 0.5 / age,
        weight_norm=1 + 0.1 * age,
    )


@lru_cache(maxsize=4096)
def _worth(environment: str, slot: int, blueprint: int) -> float:
    """Points that a blueprint brings in a slot of an environment."""
    return float(numpy_generator(SKELETON_SOURCE, "worth", environment, slot, blueprint).uniform(*WORTH_POINTS))


def _curve(spec: EnvironmentSpec, env_seed: int, chance: float) -> tuple[float, float, float]:
    """Where the never-act accuracy starts, how far it rises, and in how many epochs it makes most of its way."""
    draw = partial(numpy_generator(SKELETON_SOURCE, "curve", spec.spec_id, env_seed).uniform)
    return chance, float(draw(0.3, 0.5)) * (1 - chance), float(draw(4.0, 8.0))
