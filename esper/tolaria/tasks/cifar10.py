"""CIFAR-10, from a local Parquet file of the Hugging Face layout or through torchvision's download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from esper.kasmina.torchvision_shim import import_torchvision
from esper.leyline.errors import DataError
from esper.leyline.keys import numpy_generator
from esper.leyline.task_specs import Cifar10Task
from esper.tolaria.tasks.decoding import Pixels
from esper.tolaria.tasks.image_table import Rows, decode_rows, open_table
from esper.tolaria.tasks.location import CACHE_VARIABLE, DATA_VARIABLE, cache_folder, data_folder
from esper.tolaria.tasks.photographs import image_task_data
from esper.tolaria.tasks.split import TaskData

SIZE = 32
NUM_CLASSES = 10
FILES = ("train.parquet", "test.parquet")


def load_cifar10_task(task: Cifar10Task) -> TaskData:
    """Return the data of a task.

    The validation rows are the first of a keyed order of the training images and the training rows those after them,
    the same at every resolution; a larger training split contains a smaller one.

    Raises:
        DataError: The data are nowhere to be found, or are not CIFAR-10.
    """
    folder = _parquet_folder()
    parts: list[tuple[Pixels, Rows]]
    if folder is None:
        parts, source = _from_torchvision(task), "CIFAR-10 (torchvision)"
    else:
        parts, file_format = _from_parquet(task, folder)
        source = f"CIFAR-10 ({file_format} Parquet)"
    return image_task_data(
        parts,
        num_classes=NUM_CLASSES,
        resolution=task.resolution,
        val_rows_per_epoch=task.val_rows_per_epoch,
        source=source,
    )


def _choose(task: Cifar10Task, num_train: int, num_test: int, where: str) -> tuple[Rows, Rows, Rows]:
    """The rows of training, validation (both of the training images) and test."""
    train, val, test = task.rows
    if train + val > num_train or test > num_test:
        raise DataError(
            f"{where} holds {num_train:,} training and {num_test:,} test images\n"
            f"  expected: at least {train:,} + {val:,} to train and validate on, {test:,} to test"
        )
    order = numpy_generator("cifar10-split", "train").permutation(num_train)
    return order[val : val + train], order[:val], numpy_generator("cifar10-split", "test").permutation(num_test)[:test]


def _parquet_folder() -> Path | None:
    """The folder below (or at) the data folder that holds the two files, None where there is none."""
    root = data_folder()
    if root is None:
        return None
    for folder in (root / "cifar10", root):
        present = [(folder / name).is_file() for name in FILES]
        if any(present):
            if not all(present):
                raise DataError(f"{folder / FILES[present.index(False)]} is missing\n  expected: {' and '.join(FILES)}")
            return folder
    return None


def _from_parquet(task: Cifar10Task, folder: Path) -> tuple[list[tuple[Pixels, Rows]], str]:
    train, test = (open_table(folder / name, NUM_CLASSES) for name in FILES)
    rows = _choose(task, len(train), len(test), str(folder))
    parts = []
    for table, chosen in zip((train, train, test), rows):
        pixels, file_format = decode_rows(table, chosen, SIZE, resize=False)
        parts.append((pixels, table.labels[chosen]))
    return parts, file_format


def _from_torchvision(task: Cifar10Task) -> list[tuple[Pixels, Rows]]:
    folder = _downloaded()
    datasets = import_torchvision().datasets
    try:
        loaded = [datasets.CIFAR10(str(folder), train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder} cannot be read: {error}\n  remove the folder to download it again") from None
    images = [np.asarray(part.data, dtype=np.uint8) for part in loaded]
    labels = [np.asarray(part.targets, dtype=np.int64) for part in loaded]
    chosen = _choose(task, len(labels[0]), len(labels[1]), str(folder))
    return [(images[which][rows], labels[which][rows]) for which, rows in zip((0, 0, 1), chosen)]


def _downloaded() -> Path:
    """The folder of torchvision's files, downloaded beside it first so that it is whole or absent."""
    folder = cache_folder() / "cifar10"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="cifar10-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {folder.parent}: {error}\n  name another in ${CACHE_VARIABLE}"
        ) from None
    try:
        import_torchvision().datasets.CIFAR10(str(temporary), download=True)
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:
        if folder.is_dir():  # another process was first
            return folder
        raise DataError(
            f"CIFAR-10 is not on this machine and its download failed: {error}\n"
            f"  looked for: {' and '.join(FILES)} in {data_folder() or f'the folder of ${DATA_VARIABLE} (not set)'}, "
            f"torchvision's files in {folder}\n"
            f"  either name a folder with the two Parquet files in ${DATA_VARIABLE} or with --data, "
            "or run once with a network"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
