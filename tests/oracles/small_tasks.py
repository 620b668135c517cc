"""Random tasks of a few rows and hosts of a few hundred weights, for tests of the engine's arithmetic."""

from __future__ import annotations

import torch

from esper.kasmina.hosts import DataShape
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import BLENDS, ISOLATIONS, Blend, Isolation
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.lineage import Incubation, Lineage, new_network
from esper.tolaria.runtime import single_thread, torch_generator
from esper.tolaria.tasks import Split, TaskData

ENV_SEED = 5
ROWS = 48

IMAGE = {
    "name": "small-images",
    "task": {"kind": "cifar10", "resolution": 8, "rows": (ROWS, 16, 16)},
    "host": {"kind": "cnn", "channels": (4, 8), "kernels": (3, 1), "pools": (2, 1)},
}
TEXT = {
    "name": "small-text",
    "task": {"kind": "tinystories", "context": 6, "vocabulary": 16, "rows": (ROWS, 16, 16)},
    "host": {"kind": "transformer", "layers": 2, "heads": 2, "embed": 8, "slots": 2, "dropout": 0.0},
}
CLOCK = {
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 16,
    "batches_per_epoch": 3,
    "horizon": 8,
    "schedule": "constant",
}


def environment(kind: dict, **changes: object) -> EnvironmentSpec:
    """A small environment; `host` may hold changes of single fields."""
    host = {**kind["host"], **changes.pop("host", {})}
    return EnvironmentSpec.parse({**CLOCK, **kind, "host": host, **changes})


def random_data(spec: EnvironmentSpec) -> TaskData:
    """Random images of ten classes, or random tokens, keyed."""
    generator = torch_generator("small-task", spec.task.kind)
    if spec.host.topology == "cnn":
        size = spec.task.resolution
        shape = DataShape(kind="image", channels=3, resolution=size, num_classes=10)
        inputs = torch.randn(ROWS, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (ROWS,), generator=generator)
    else:
        tokens = torch.randint(0, spec.task.vocabulary, (ROWS, spec.task.context + 1), generator=generator)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        shape = DataShape(kind="text", channels=1, resolution=spec.task.context, num_classes=spec.task.vocabulary)
    split = Split(inputs=inputs, labels=labels)
    return TaskData(
        train=split,
        val=split.first(16),
        val_epoch=split.first(16),
        test=split.first(16),
        shape=shape,
        source="random",
        digest="0" * 16,
        chance=0.1,
    )


def small_lineage(spec: EnvironmentSpec, data: TaskData) -> Lineage:
    """A fresh lineage of the bare host."""
    single_thread()
    return Lineage("key", spec, new_network(spec, ENV_SEED, data))


def incubate(lineage: Lineage, slot: int, blueprint: int, incubation: str = "own_pass", start: int = 0) -> Incubation:
    """A seed beside the host, its weights shaken so that no gradient is zero for its zero start."""
    key = SeedKey(slot, blueprint, 1, 0, incubation, start)
    its = lineage.incubate(key, ENV_SEED, lineage.network.host.places[slot].channels)
    shake(its.module, slot, blueprint)
    return its


def blend(lineage: Lineage, slot: int, blueprint: int, isolation: str, kind: str = "linear") -> None:
    """A seed within the host, to be at alpha = 1/3 in the next epoch; its gate, if any, away from its start."""
    its = incubate(lineage, slot, blueprint)
    levers = {"blend": BLENDS.index(Blend(kind)), "tempo": 0, "dwell": 0}
    state = SlotState(seed=its.key, isolation=ISOLATIONS.index(Isolation(isolation)), **levers)
    lineage.blend_in(state, ENV_SEED)


def shake(module: torch.nn.Module, *key: int) -> None:
    """Add keyed noise to every weight."""
    generator = torch_generator("shake", *key)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
