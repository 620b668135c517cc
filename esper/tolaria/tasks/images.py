"""Images of the user's own: one Parquet file, or a folder with one folder of image files per class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from esper.leyline.errors import DataError
from esper.leyline.keys import numpy_generator
from esper.leyline.task_specs import ImagesTask
from esper.tolaria.tasks.decoding import Pixels, decode_image
from esper.tolaria.tasks.image_table import Rows, decode_rows, open_table
from esper.tolaria.tasks.location import locate
from esper.tolaria.tasks.photographs import image_task_data
from esper.tolaria.tasks.split import TaskData


def load_images_task(task: ImagesTask) -> TaskData:
    """Return the data of a task: test, validation and training rows in this order of a keyed order of all images.

    Raises:
        DataError: The data are missing or too few, or a row is wrong; it is named.
    """
    path = locate(task.path)
    if path.is_dir():
        parts, num_classes, file_format = _from_folder(task, path)
    else:
        table = open_table(path)
        num_classes = table.num_classes
        parts = []
        for rows in _choose(task, len(table), path):
            pixels, file_format = decode_rows(table, rows, task.resolution, resize=True)
            parts.append((pixels, table.labels[rows]))
    layout = "folders" if path.is_dir() else "Parquet"
    return image_task_data(
        parts,
        num_classes=num_classes,
        resolution=task.resolution,
        val_rows_per_epoch=task.val_rows_per_epoch,
        source=f"images {task.name!r} ({file_format} {layout})",
    )


def _choose(task: ImagesTask, num_images: int, path: Path) -> tuple[Rows, Rows, Rows]:
    train, val, test = task.rows
    if train + val + test > num_images:
        raise DataError(
            f"{path} holds {num_images:,} images\n"
            f"  expected: at least {train:,} + {val:,} + {test:,}; ask for fewer rows"
        )
    order = numpy_generator("images-split", task.name).permutation(num_images)
    return order[test + val : test + val + train], order[test : test + val], order[:test]


def _from_folder(task: ImagesTask, root: Path) -> tuple[list[tuple[Pixels, Rows]], int, str]:
    files, labels, num_classes = _walk(root)
    formats: Counter[str] = Counter()
    parts = []
    for rows in _choose(task, len(files), root):
        pixels = np.empty((len(rows), task.resolution, task.resolution, 3), dtype=np.uint8)
        for target, row in zip(pixels, rows):
            path = files[row]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            target[:], kind = decode_image(data, str(path), task.resolution, resize=True)
            formats[kind] += 1
        parts.append((pixels, labels[rows]))
    return parts, num_classes, formats.most_common(1)[0][0]


def _walk(root: Path) -> tuple[list[Path], Rows, int]:
    """The files below each class's folder, in the order of their names; hidden ones are none of the data."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise DataError(f"{root} holds {len(folders)} class folders\n  expected: one folder per class, at least two")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = (path for path in folder.rglob("*") if path.is_file())
        found = sorted(path for path in inside if not any(p.startswith(".") for p in path.relative_to(root).parts))
        if not found:
            raise DataError(f"class folder {folder} is empty\n  expected: at least one image; fill or remove it")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64), len(folders)
