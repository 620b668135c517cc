"""What a worker holds at most while it runs a cohort, from the plan alone: nothing is loaded, built or run.

It counts tensors. The process itself (interpreter and libraries, and on a GPU its context) comes on top, and is the
same for every cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.kasmina.blueprints import build_blueprint
from esper.kasmina.gating import gate_params
from esper.kasmina.hosts import DataShape, Host, build_host
from esper.kasmina.network import Network
from esper.leyline.host_specs import HostSpec, Topology
from esper.leyline.identity import Root
from esper.leyline.matrix import CohortPlan
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.task_specs import Cifar10Task, DigitsTask, ImagesTask, TaskSpec
from esper.tolaria.governor import SNAPSHOT_EVERY_EPOCHS
from esper.tolaria.probes import CHUNK_ANSWERS, TOKENS_PER_ANSWER
from esper.tolaria.roots import root_environment
from esper.tolaria.tasks import load_task

_FLOAT_BYTES = 4
_INDEX_BYTES = 8

_LOADING_COPIES = 4
"""While images are decoded, pooled and standardised, raw pixels and floats of several splits are held at once."""

_ACTIVATION_COPIES = 3
"""What backward keeps of a forward pass, as much again for gradients on their way, and for an own pass beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBound:
    """Bytes that a worker's tensors take at most.

    Attributes:
        data_bytes: The task: while it is loaded, or for good and once more on a GPU.
        lineage_bytes: One lineage with a seed in every slot: weights, gradients, optimiser state, last good state.
        num_lineages: Lineages at once: one per episode, the trunk, and one that is being forked.
        snapshots_bytes: Copies of lineages that branches start from.
        batch_bytes: Activations of the lineage that trains, or validates.
    """

    data_bytes: int
    lineage_bytes: int
    num_lineages: int
    snapshots_bytes: int
    batch_bytes: int

    @property
    def lineages_bytes(self) -> int:
        """All lineages at once."""
        return self.num_lineages * self.lineage_bytes

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.data_bytes + self.lineages_bytes + self.snapshots_bytes + self.batch_bytes


def cohort_memory(plan: CohortPlan) -> MemoryBound:
    """Return the bound of a cohort on one worker."""
    spec, shape = plan.environment, task_shape(plan.environment.task)
    members = {*plan.episodes, *(branch.parent for branch in plan.branches)}
    environments = [root_environment(spec, root) for root in {Root.HOST.value, *(member.root for member in members)}]
    lineage = max(lineage_bytes(environment, shape) for environment in environments)
    num_snapshots = spec.horizon // SNAPSHOT_EVERY_EPOCHS + 1 if plan.branches else 0
    # a branch copies the snapshot that it starts from, all of it, and then runs its own lineage and the trunk's
    copies = (len(members) + 1) * (num_snapshots + 1) + 2 if plan.branches else 0
    return MemoryBound(
        data_bytes=_data_bytes(spec.task, shape),
        lineage_bytes=lineage,
        num_lineages=len(members) + 2,
        snapshots_bytes=copies * lineage,
        batch_bytes=max(_batch_bytes(environment, shape) for environment in environments),
    )


@lru_cache(maxsize=64)
def lineage_bytes(spec: EnvironmentSpec, shape: DataShape) -> int:
    """Return the bytes of one lineage at most: its host with the largest seed, and a gate, in every slot.

    A seed counts once whether it incubates or is blended in: no rider has more seeds than slots.
    """
    host = _meta_host(spec.host, shape)
    weights = sum(_bytes(weight) for weight in host.parameters())
    buffers = sum(_bytes(buffer) for buffer in host.buffers())
    weights += sum(_largest_seed_bytes(spec, place.channels) for place in host.places)
    state = weights * (2 if spec.optimiser == "adam" else 1)
    live = 2 * weights + buffers + state  # with gradients
    good = weights + buffers + state
    return live + good + weights  # the executor compares an epoch's weights with those before it


def task_shape(task: TaskSpec) -> DataShape:
    """Return what a host reads and answers; images of the user's own are read for the number of their classes.

    Raises:
        DataError: Images of the user's own are missing.
    """
    if isinstance(task, DigitsTask):
        return DataShape(kind="image", channels=1, resolution=task.canvas, num_classes=10)
    if isinstance(task, Cifar10Task):
        return DataShape(kind="image", channels=3, resolution=task.resolution, num_classes=10)
    if isinstance(task, ImagesTask):
        return load_task(task).shape
    return DataShape(kind="text", channels=1, resolution=task.context, num_classes=task.vocabulary)


def _data_bytes(task: TaskSpec, shape: DataShape) -> int:
    if isinstance(task, DigitsTask):
        rows = sum(count * copies for count, copies in zip(task.sources, task.copies, strict=True))
    else:
        rows = sum(task.rows)
    if shape.kind == "text":
        return _LOADING_COPIES * rows * 2 * shape.resolution * _INDEX_BYTES
    pixels = shape.channels * shape.resolution**2
    return _LOADING_COPIES * rows * (pixels * _FLOAT_BYTES + _INDEX_BYTES)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@lru_cache(maxsize=64)
def _meta_host(spec: HostSpec, shape: DataShape) -> Host:
    with torch.device("meta"):
        return build_host(spec, shape)


@lru_cache(maxsize=64)
def _meta_seeds(topology: Topology, blueprints: tuple[str, ...], channels: int) -> tuple[nn.Module, ...]:
    with torch.device("meta"):
        return tuple(build_blueprint(topology, name, channels) for name in blueprints)


def _largest_seed_bytes(spec: EnvironmentSpec, channels: int) -> int:
    seeds = _meta_seeds(spec.host.topology, spec.blueprints, channels)
    largest = max(sum(_bytes(weight) for weight in seed.parameters()) for seed in seeds)
    return largest + _FLOAT_BYTES * gate_params(channels)


@lru_cache(maxsize=64)
def _batch_bytes(spec: EnvironmentSpec, shape: DataShape) -> int:
    """Activations of a training batch with the hungriest seed in every slot, or of a validation chunk."""
    tokens = shape.resolution if shape.kind == "text" else 0
    chunk = max(1, CHUNK_ANSWERS * TOKENS_PER_ANSWER // tokens) if tokens else CHUNK_ANSWERS
    training = _ACTIVATION_COPIES * _saved_bytes(spec, shape, spec.batch_size)
    return max(training, _saved_bytes(spec, shape, chunk))


def _saved_bytes(spec: EnvironmentSpec, shape: DataShape, rows: int) -> int:
    """Bytes that autograd keeps of a forward pass of the host and of the hungriest seed in each slot, from shapes."""
    host = _meta_host(spec.host, shape)
    if shape.kind == "text":
        inputs = torch.zeros(rows, shape.resolution, dtype=torch.int64, device="meta")
    else:
        inputs = torch.zeros(rows, shape.channels, shape.resolution, shape.resolution, device="meta")
    total = _kept_bytes(lambda: Network(host).run(inputs)[0])
    for place in host.places:
        if shape.kind == "text":
            h = torch.zeros(rows, shape.resolution, place.channels, device="meta", requires_grad=True)
        else:
            h = torch.zeros(rows, place.channels, place.resolution, place.resolution, device="meta", requires_grad=True)
        seeds = _meta_seeds(spec.host.topology, spec.blueprints, place.channels)
        total += max(_kept_bytes(partial(seed, h)) for seed in seeds)
    return total


def _kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of what a forward pass leaves for its backward pass, each storage once."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = StorageWeakRef(storage).cdata  # type: ignore[no-untyped-call]
        kept[place] = (tensor, storage.nbytes())  # held, or its place could be given away
        return tensor

    # attention as its two products: no kernel keeps more
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(num_bytes for _, num_bytes in kept.values())
