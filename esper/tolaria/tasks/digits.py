"""The embedded task: scikit-learn's 8x8 digits, plain or placed at random on a noisy canvas."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from esper.kasmina.hosts import DataShape
from esper.leyline.keys import numpy_generator
from esper.leyline.task_specs import DigitsTask
from esper.tolaria.tasks.split import Split, TaskData, content_digest

Images = NDArray[np.float32]


def load_digits_task(task: DigitsTask) -> TaskData:
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
    return TaskData(
        train=train,
        val=val,
        val_epoch=val,
        test=test,
        shape=DataShape(kind="image", channels=1, resolution=task.canvas, num_classes=10),
        source="scikit-learn's bundled 8x8 digits",
        digest=content_digest(train, val, test),
        chance=0.1,
    )


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
    # one channel has no layout, but its strides decide the layout of all that follows: few channels want the plain one
    return Split(inputs=torch.from_numpy(np.ascontiguousarray(images[:, None])), labels=torch.from_numpy(labels))
