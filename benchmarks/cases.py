"""Hosts and tasks that the benchmarks run, with the same network written plainly beside each.

Images of 32x32 are random pixels laid out by the tasks' own code: what a step costs does not depend on them. Digits are
the embedded task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.hosts import DataShape
from esper.leyline.host_specs import CnnHost, ResNetHost, TransformerHost
from esper.leyline.keys import numpy_generator
from esper.leyline.library import load_environment
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.lineage import Lineage, new_network
from esper.tolaria.tasks import Split, TaskData, load_task
from tests.oracles import plain_loop as plain

ENV_SEED = 5

DIGITS_8 = {"kind": "digits"}
DIGITS_12 = load_environment("digits-gap").task.model_dump()
PHOTOGRAPHS_32 = {"kind": "cifar10"}
STORIES = {"kind": "tinystories", "context": 64, "vocabulary": 256}

SMALL = {"kind": "cnn", "channels": (8, 16, 32), "kernels": (3, 3, 3), "pools": (2, 2, 2)}
LARGE = {**SMALL, "channels": (32, 64, 128)}
GAP = {"kind": "cnn", "channels": (4, 8, 16), "kernels": (3, 1, 1), "pools": (2, 2, 2)}
RESNET = {"kind": "resnet", "layers": 18, "width_factor": 0.125}
DECODER = {"kind": "transformer", "layers": 4, "heads": 4, "embed": 64, "slots": 2, "dropout": 0.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A host on a task.

    Attributes:
        name: As it is printed.
        task: Fields of the task.
        host: Fields of the host.
        batches: Training batches of a measured round.
        augmented: Crops and flips.
        batch_size: Rows.
        val_rows: Validation rows, of random images.
    """

    name: str
    task: dict[str, object]
    host: dict[str, object]
    batches: int
    augmented: bool = False
    batch_size: int = 128
    val_rows: int = 1280

    def environment(self, batches: int | None = None) -> EnvironmentSpec:
        """Return the environment; one that augments digits says that they are photographs, which alone may be."""
        task = {"kind": "images", "name": "digits", "path": "-", "rows": (1, 1, 1)}
        return EnvironmentSpec.parse(
            {
                "name": "benchmark",
                "task": task if self.augmented and self.task["kind"] == "digits" else self.task,
                "host": self.host,
                "learning_rate": 0.01,
                "weight_decay": 5e-4,
                "batch_size": self.batch_size,
                "batches_per_epoch": self.batches if batches is None else batches,
                "horizon": 20,
                "augment": "crop-flip" if self.augmented else "none",
            }
        )

    def data(self, quick: bool = False) -> TaskData:
        """Return the task: digits, or random images or tokens."""
        environment = self.environment()
        if self.task["kind"] == "digits":
            digits = EnvironmentSpec.parse({**environment.model_dump(), "task": self.task, "augment": "none"})
            return load_task(digits.task)
        rows = (2 * self.batch_size, self.batch_size) if quick else (4096, self.val_rows)
        return random_tokens(environment, rows) if self.task["kind"] == "tinystories" else random_images(32, rows)


IMAGES = (
    Case("8/16/32 at 3x32x32", PHOTOGRAPHS_32, SMALL, 10),
    Case("32/64/128 at 3x32x32", PHOTOGRAPHS_32, LARGE, 4),
    Case("8/16/32 at 3x32x32, crop and flip", PHOTOGRAPHS_32, SMALL, 10, augmented=True),
    Case("32/64/128 at 3x32x32, crop and flip", PHOTOGRAPHS_32, LARGE, 4, augmented=True),
    Case("8/16/32 at 1x8x8", DIGITS_8, SMALL, 50),
    Case("32/64/128 at 1x8x8", DIGITS_8, LARGE, 30),
    Case("4/8/16 k311 at 1x12x12", DIGITS_12, GAP, 50),
    Case("8/16/32 at 1x8x8, crop and flip", DIGITS_8, SMALL, 50, augmented=True),
    Case("32/64/128 at 1x8x8, crop and flip", DIGITS_8, LARGE, 30, augmented=True),
    Case("4/8/16 k311 at 1x12x12, crop and flip", DIGITS_12, GAP, 50, augmented=True),
)
OTHERS = (
    Case("ResNet-18 of 8/16/32/64 at 3x32x32", PHOTOGRAPHS_32, RESNET, 3, val_rows=512),
    Case("decoder, 4 layers of 64, 64 tokens", STORIES, DECODER, 8, batch_size=32, val_rows=128),
)
ALL = (*IMAGES, *OTHERS)


def case(name: str) -> Case:
    """Return the case of a name."""
    return next(known for known in ALL if known.name == name)


def random_images(size: int, rows: tuple[int, int]) -> TaskData:
    """Return random colour images of ten classes, standardised and laid out as photographs are."""
    from esper.tolaria.tasks.photographs import image_task_data

    rng = numpy_generator("benchmark", "pixels", size)
    parts = [
        (rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 10, count))
        for count in (*rows, rows[1])
    ]
    return image_task_data(parts, num_classes=10, resolution=size, val_rows_per_epoch=None, source="random pixels")


def random_tokens(environment: EnvironmentSpec, rows: tuple[int, int]) -> TaskData:
    """Return random tokens."""
    task = environment.task.model_dump()
    rng = numpy_generator("benchmark", "tokens")

    def split(count: int) -> Split:
        tokens = torch.from_numpy(rng.integers(0, task["vocabulary"], (count, task["context"] + 1)))
        return Split(inputs=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())

    val = split(rows[1])
    shape = DataShape(kind="text", channels=1, resolution=task["context"], num_classes=task["vocabulary"])
    return TaskData(
        train=split(rows[0]),
        val=val,
        val_epoch=val,
        test=val,
        shape=shape,
        source="random tokens",
        digest="0" * 16,
        chance=1 / task["vocabulary"],
    )


def new_lineage(environment: EnvironmentSpec, data: TaskData) -> Lineage:
    """Return Esper's bare host at the beginning of its first epoch."""
    lineage = Lineage("benchmark", environment, new_network(environment, ENV_SEED, data))
    lineage.begin_epoch(0)
    return lineage


def plain_network(environment: EnvironmentSpec, data: TaskData, lineage: Lineage) -> plain.Segmented:
    """Return the same network of torch's own modules, contiguous, with the same weights."""
    host, shape = environment.host, data.shape
    network: plain.Segmented
    if isinstance(host, CnnHost):
        network = plain.PlainCnn(shape.channels, host.block_channels, host.kernels, host.pools, shape.num_classes)
    elif isinstance(host, ResNetHost):
        network = plain.PlainResNet(shape.channels, host.stage_channels, host.stage_blocks, shape.num_classes)
    elif isinstance(host, TransformerHost):
        network = plain.PlainDecoder(
            shape.num_classes, shape.resolution, host.embed_width, host.heads, host.layers, host.slots
        )
    return plain.with_state_of(network, lineage.network.host)


def plain_optimiser(environment: EnvironmentSpec, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return torch's SGD as it comes, not fused."""
    return plain.plain_optimiser(
        list(parameters), environment.learning_rate, environment.momentum, environment.weight_decay
    )
