"""Tasks: their data in memory as tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from esper.leyline.task_specs import Cifar10Task, DigitsTask, ImagesTask, TaskSpec
from esper.tolaria.runtime import CPU
from esper.tolaria.tasks.cifar10 import load_cifar10_task
from esper.tolaria.tasks.digits import load_digits_task
from esper.tolaria.tasks.images import load_images_task
from esper.tolaria.tasks.location import cache_folder, data_folder, set_data_folder
from esper.tolaria.tasks.split import Split, TaskData
from esper.tolaria.tasks.text import load_tinystories_task

__all__ = ["Split", "TaskData", "load_task", "set_data_folder"]


def load_task(task: TaskSpec, device: torch.device = CPU) -> TaskData:
    """Return the data of a task, loaded once per process and device.

    The same spec on the same data gives the same bytes.

    Args:
        task: The task.
        device: Where the data are to lie.

    Raises:
        DataError: The data are missing or wrong.
    """
    data = _load(task, data_folder(), cache_folder())
    return data if device == CPU else _on_device(task, data.digest, device)


@lru_cache(maxsize=4)
def _on_device(task: TaskSpec, digest: str, device: torch.device) -> TaskData:
    """The task on another device than the CPU; `digest` tells other data under the same task apart."""
    data = _load(task, data_folder(), cache_folder())
    return data.to(device)


@lru_cache(maxsize=4)
def _load(task: TaskSpec, data: Path | None, cache: Path) -> TaskData:
    """The task under the folders that it is read from: another folder is other data."""
    if isinstance(task, DigitsTask):
        return load_digits_task(task)
    if isinstance(task, Cifar10Task):
        return load_cifar10_task(task)
    if isinstance(task, ImagesTask):
        return load_images_task(task)
    return load_tinystories_task(task)
