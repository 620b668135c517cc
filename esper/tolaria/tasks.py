"""Task data in memory as tensors: training, validation (what controllers and rewards see) and test (reported only)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.leyline.keys import numpy_generator
from esper.leyline.specs import DigitsTask

Images = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Inputs float32 [N, C, H, W] (channels last in memory) and labels int64 [N]."""

    x_NCHW: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """The three splits of a task."""

    train: Split
    val: Split
    test: Split
    num_classes: int

    @property
    def in_channels(self) -> int:
        """Channels of an input."""
        return int(self.train.x_NCHW.shape[1])

    @property
    def resolution(self) -> int:
        """Height and width of an input in pixels."""
        return int(self.train.x_NCHW.shape[2])

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1.0 / self.num_classes


@lru_cache(maxsize=8)
def load_task(task: DigitsTask) -> TaskData:
    """Return the data of a task; the same spec gives the same bytes."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = (bundle.images / 16.0).astype(np.float32)
    labels = bundle.target.astype(np.int64)
    order = numpy_generator("digits-split", task.task_id).permutation(len(images))
    raw: list[tuple[Images, NDArray[np.int64]]] = []
    start = 0
    for name, count, copies in zip(("train", "val", "test"), task.sources, task.copies):
        chosen = np.tile(order[start : start + count], copies)
        rng = numpy_generator("digits-copies", task.task_id, name)
        raw.append((_place(images[chosen], task, rng), labels[chosen]))
        start += count
    mean, deviation = float(raw[0][0].mean()), float(raw[0][0].std())
    train, val, test = (_split((x - mean) / deviation, y) for x, y in raw)
    return TaskData(train=train, val=val, test=test, num_classes=10)


def _place(images: Images, task: DigitsTask, rng: np.random.Generator) -> Images:
    """Put each 8x8 image at a random place on a blank canvas and add noise."""
    size = images.shape[1]
    canvas = np.zeros((len(images), task.canvas, task.canvas), dtype=np.float32)
    offsets = rng.integers(0, task.canvas - size + 1, size=(len(images), 2))
    for image, (row, column), target in zip(images, offsets, canvas):
        target[row : row + size, column : column + size] = image
    if task.noise_sd:
        canvas += rng.normal(0.0, task.noise_sd, size=canvas.shape).astype(np.float32)
    return canvas


def _split(images: Images, labels: NDArray[np.int64]) -> Split:
    x = torch.from_numpy(np.ascontiguousarray(images[:, None]))
    return Split(x_NCHW=x.contiguous(memory_format=torch.channels_last), y_N=torch.from_numpy(labels))
