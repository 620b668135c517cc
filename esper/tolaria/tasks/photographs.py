"""From pixels to the splits of an image task: pooled, standardised by the training rows, channels last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from esper.kasmina.hosts import DataShape
from esper.leyline.errors import DataError
from esper.tolaria.tasks.decoding import Pixels
from esper.tolaria.tasks.split import Split, TaskData, content_digest

Labels = NDArray[np.int64]
Sums = NDArray[np.uint8] | NDArray[np.uint16]


def image_task_data(
    parts: Sequence[tuple[Pixels, Labels]],
    *,
    num_classes: int,
    resolution: int,
    val_rows_per_epoch: int | None,
    source: str,
) -> TaskData:
    """Return the task of three parts: train, validation, test.

    Args:
        parts: Pixels, uint8 [N, S, S, 3] with S a multiple of the resolution, and classes, int64 [N].
        num_classes: Classes.
        resolution: Height and width after mean-pooling, pixels.
        val_rows_per_epoch: Validation rows read every epoch; None, all.
        source: Where the data came from, in words.

    Raises:
        DataError: The training rows hold one class alone.
    """
    if len(np.unique(parts[0][1])) < 2:
        raise DataError(f"{source}: all training rows have one class\n  expected: at least two; ask for more rows")
    pooled = [_pool(pixels, resolution) for pixels, _ in parts]
    moments = [_moments(pooled[0][..., channel]) for channel in range(3)]
    train, val, test = (_standardise(sums, moments, labels) for sums, (_, labels) in zip(pooled, parts))
    return TaskData(
        train=train,
        val=val,
        val_epoch=val if val_rows_per_epoch is None else val.first(val_rows_per_epoch),
        test=test,
        shape=DataShape(kind="image", channels=3, resolution=resolution, num_classes=num_classes),
        source=source,
        digest=content_digest(train, val, test),
        chance=1.0 / num_classes,
    )


def _pool(pixels: Pixels, resolution: int) -> Sums:
    """Sums over square patches: means but for a factor that standardising takes out."""
    count, size = pixels.shape[:2]
    patch = size // resolution
    if patch == 1:
        return pixels
    patches = pixels.reshape(count, resolution, patch, resolution, patch, 3)
    sums: Sums = patches.sum(axis=(2, 4), dtype=np.uint16)
    return sums


def _moments(values: Sums) -> tuple[float, float]:
    """Mean and deviation from an exact histogram; the deviation of a constant channel is taken as 1."""
    counts = np.bincount(values.reshape(-1)).astype(np.float64)
    levels = np.arange(len(counts))
    mean = float(counts @ levels / counts.sum())
    variance = float(counts @ (levels - mean) ** 2 / counts.sum())
    return mean, variance**0.5 or 1.0


def _standardise(sums: Sums, moments: Sequence[tuple[float, float]], labels: Labels) -> Split:
    images = sums.astype(np.float32)
    for channel, (mean, deviation) in enumerate(moments):
        images[..., channel] -= np.float32(mean)
        images[..., channel] /= np.float32(deviation)
    # rows of pixels seen as channels, height, width are channels last already
    return Split(inputs=torch.from_numpy(images).permute(0, 3, 1, 2), labels=torch.from_numpy(labels))
