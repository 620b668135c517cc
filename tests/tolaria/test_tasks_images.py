from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import encoded, noise, png_that_claims, write_cifar, write_table

from esper.kasmina.torchvision_shim import import_torchvision
from esper.leyline.errors import DataError
from esper.leyline.keys import numpy_generator
from esper.leyline.task_specs import Cifar10Task, ImagesTask
from esper.tolaria.tasks import load_task, set_data_folder
from esper.tolaria.tasks.cifar10 import load_cifar10_task
from esper.tolaria.tasks.decoding import decode_image
from esper.tolaria.tasks.images import load_images_task

SMALL = Cifar10Task(rows=(30, 20, 10), val_rows_per_epoch=8)
REAL = os.environ.get("ESPER_DATA") or os.environ.get("CIFAR10_DIR")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder and an empty cache."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("ESPER_DATA", str(folder))
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    return folder


def mine(**changes):
    return ImagesTask(**{"name": "mine", "path": "mine.parquet", "resolution": 8, "rows": (6, 2, 2), **changes})


def rows_of(split):
    return {x.numpy().tobytes() for x in split.inputs}


def test_cifar_is_split_by_key_into_disjoint_rows_and_read_the_same_twice(data):
    write_cifar(data / "cifar10")
    task = load_task(SMALL)
    assert [len(task.train), len(task.val), len(task.val_epoch), len(task.test)] == [30, 20, 8, 10]
    assert torch.equal(task.val_epoch.inputs, task.val.inputs[:8])
    train, val, test = map(rows_of, (task.train, task.val, task.test))
    assert len(train | val | test) == 60
    assert load_task(SMALL) is task
    again = load_cifar10_task(SMALL)
    assert again.digest == task.digest
    assert torch.equal(again.train.labels, task.train.labels)
    assert (task.source, task.chance, task.shape.num_classes) == ("CIFAR-10 (PNG Parquet)", 0.1, 10)


def test_validation_is_the_same_for_every_number_of_training_rows_and_training_rows_are_nested(data):
    write_cifar(data)
    small, large = load_task(SMALL), load_task(Cifar10Task(rows=(40, 20, 10)))
    assert torch.equal(small.val.labels, large.val.labels)
    assert torch.equal(small.train.labels, large.train.labels[:30])
    assert torch.equal(small.test.labels, large.test.labels)


@pytest.mark.parametrize("resolution", [32, 16, 8])
def test_pixels_are_the_files_own_mean_pooled_and_standardised_by_the_training_rows(data, resolution):
    pixels = write_cifar(data)
    task = load_task(Cifar10Task(rows=(40, 20, 10), resolution=resolution))
    patch = 32 // resolution
    pooled = pixels.reshape(60, resolution, patch, resolution, patch, 3).astype(np.float64).mean(axis=(2, 4))
    order = numpy_generator("cifar10-split", "train").permutation(60)
    train, val = pooled[order[20:]], pooled[order[:20]]
    mean, deviation = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    for split, expected in ((task.train, train), (task.val, val)):
        standard = ((expected - mean) / deviation).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(split.inputs.numpy(), standard, atol=1e-5)
        assert split.inputs.is_contiguous(memory_format=torch.channels_last)
    assert task.train.labels.tolist() == (order[20:] % 10).tolist()


def test_another_data_folder_is_other_data(data, tmp_path, monkeypatch):
    write_cifar(data)
    first = load_task(SMALL)
    other = tmp_path / "other"
    write_table(other / "train.parquet", [encoded(x) for x in noise(60, seed=9)], [i % 10 for i in range(60)])
    write_table(other / "test.parquet", [encoded(x) for x in noise(20, seed=8)], [i % 10 for i in range(20)])
    monkeypatch.setenv("ESPER_DATA", "unset again at the end")
    set_data_folder(other)
    assert load_task(SMALL).digest != first.digest
    with pytest.raises(DataError, match="is not a folder"):
        set_data_folder(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": b"\x89PNG broken"}, r"row 3 of .*train.parquet \(made/3.png\): cannot be read as an image"),
        ({"image": None}, r"row 3 of .*bytes are missing"),
        ({"image": png_that_claims(20_000, 20_000)}, r"row 3 of .*(20,000 x 20,000 pixels|too large)"),
        ({"image": png_that_claims(9_000, 8_000)}, r"row 3 of .*9,000 x 8,000 pixels"),
        ({"image": encoded(noise(1, 16)[0])}, r"row 3 of .*16 x 16 pixels\n  expected: 32 x 32"),
        ({"image": encoded(noise(1, 32)[0, ..., 0].astype(np.uint16))}, r"row 3 of .*image mode 'I;16'"),
        ({"image": encoded(noise(1)[0], "JPEG")[:400]}, r"row 3 of .*cannot be read as an image"),
        ({"label": 10}, r"row 3 of .*label 10 is out of range\n  expected: 0 to 9"),
        ({"label": -1}, r"row 3 of .*label -1 is out of range"),
        ({"label": None}, r"row 3 of .*the label is missing"),
    ],
)
def test_a_wrong_row_is_named(data, change, words):
    write_cifar(data)
    images = [change.get("image", b"") if i == 3 and "image" in change else encoded(x) for i, x in enumerate(noise(60))]
    labels = [change["label"] if i == 3 and "label" in change else i % 10 for i in range(60)]
    write_table(data / "train.parquet", images, labels)
    with pytest.raises(DataError, match=words) as caught:
        load_task(Cifar10Task(rows=(40, 20, 10)))
    assert " at 0x" not in str(caught.value)  # stored with the episode, it must be the same in every run


def test_the_size_of_an_image_is_refused_before_memory_is_asked_for():
    tracemalloc.start()
    with pytest.raises(DataError, match="pixels"):
        decode_image(png_that_claims(9_000, 9_000), "here", 32, resize=True)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"labels": None}, "no column 'label' or 'labels'\n  its columns: img"),
        ({"img": "photo"}, "no column 'img' or 'image'\n  its columns: photo, label"),
        ({"labels": [4] * 60}, "fewer than two classes"),
        ({"labels": [0.5] * 60}, "labels of type double"),
        ({"count": 0}, "fewer than two classes"),
        ({"count": 59}, "holds 59 training and 20 test images\n  expected: at least 40 \\+ 20"),
    ],
)
def test_a_table_that_is_no_task_is_refused(data, columns, words):
    write_cifar(data)
    count = columns.get("count", 60)
    labels = columns.get("labels", pa.array([i % 10 for i in range(count)], pa.int64()))
    write_table(data / "train.parquet", [encoded(x) for x in noise(count)], labels, img=columns.get("img", "img"))
    with pytest.raises(DataError, match=words):
        load_task(Cifar10Task(rows=(40, 20, 10)))


def test_a_file_that_is_no_parquet_and_a_missing_half_are_said(data):
    write_cifar(data)
    (data / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet"):
        load_task(SMALL)
    (data / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"test\.parquet is missing"):
        load_task(SMALL)


def test_without_data_and_without_a_network_the_error_says_where_it_looked_and_what_to_do(data, monkeypatch):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"download failed: .*no network") as caught:
        load_task(SMALL)
    for words in (str(data), "train.parquet and test.parquet", "ESPER_DATA", str(data.parent / "cache" / "cifar10")):
        assert words in str(caught.value)
    assert list((data.parent / "cache").iterdir()) == []


def test_what_torchvision_downloaded_is_read_from_the_cache(data, monkeypatch):
    """Its own files, made small, with their checksums."""
    folder = data.parent / "cache" / "cifar10"
    write_torchvision_cifar(folder, monkeypatch)
    task = load_task(Cifar10Task(rows=(30, 20, 10)))
    assert task.source == "CIFAR-10 (torchvision)"
    write_cifar(data)
    twin = load_cifar10_task(Cifar10Task(rows=(30, 20, 10)))
    assert twin.source == "CIFAR-10 (PNG Parquet)"
    assert torch.equal(task.train.inputs, twin.train.inputs)
    assert torch.equal(task.train.labels, twin.train.labels)
    assert task.digest == twin.digest


def write_torchvision_cifar(folder, monkeypatch):
    import_torchvision()
    from torchvision.datasets import CIFAR10

    batches = folder / CIFAR10.base_folder
    batches.mkdir(parents=True)
    content = {
        "train_list": {"data": noise(60), "labels": [i % 10 for i in range(60)]},
        "test_list": {"data": noise(20, seed=1), "labels": [i % 10 for i in range(20)]},
        "meta": {"label_names": [str(i) for i in range(10)]},
    }
    for kind, entry in content.items():
        if "data" in entry:
            entry["data"] = entry["data"].transpose(0, 3, 1, 2).reshape(len(entry["data"]), -1)
        (batches / kind).write_bytes(pickle.dumps(entry))
        checksum = hashlib.md5((batches / kind).read_bytes()).hexdigest()
        listed = [[kind, checksum]] if kind != "meta" else {"filename": kind, "key": "label_names", "md5": checksum}
        monkeypatch.setattr(CIFAR10, kind, listed)


def test_images_come_from_parquet_with_labels_mapped_and_sizes_made_equal(data):
    images = [encoded(np.full((9 + i, 12, 3), 20 * i, np.uint8)) for i in range(12)]
    write_table(data / "mine.parquet", images, ["oak", "elm", "fir"] * 4, img="image", label="labels")
    task = load_task(mine())
    assert (task.shape.num_classes, task.shape.resolution, task.chance) == (3, 8, pytest.approx(1 / 3))
    assert task.source == "images 'mine' (PNG Parquet)"
    assert len(rows_of(task.train) | rows_of(task.val) | rows_of(task.test)) == 10
    order = numpy_generator("images-split", "mine").permutation(12)
    assert task.test.labels.tolist() == [(2, 0, 1)[i % 3] for i in order[:2]]
    assert task.train.labels.tolist() == [(2, 0, 1)[i % 3] for i in order[4:10]]


def test_whole_numbers_are_mapped_in_rising_order_unless_the_file_names_its_classes(data):
    images = [encoded(x) for x in noise(12, 8)]
    write_table(data / "mine.parquet", images, [3, 7] * 6)
    assert load_task(mine()).shape.num_classes == 2
    table = pq.read_table(data / "mine.parquet")
    names = {"info": {"features": {"label": {"names": [f"c{i}" for i in range(8)], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), data / "named.parquet")
    assert load_task(mine(path="named.parquet")).shape.num_classes == 8
    names["info"]["features"]["label"]["names"] = ["a", "b", "c"]
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), data / "few.parquet")
    with pytest.raises(DataError, match=r"row 0 of .*label 3 is out of range\n  expected: 0 to 2"):
        load_task(mine(path="few.parquet"))


def write_tree(root: Path, count: int = 6) -> None:
    for label, name in enumerate(("ants", "bees")):
        (root / name).mkdir(parents=True)
        for index, pixels in enumerate(noise(count, 10, seed=label)):
            (root / name / f"{index}.png").write_bytes(encoded(pixels))


def test_a_tree_and_a_table_of_the_same_images_are_the_same_task(data):
    write_tree(data / "tree")
    (data / "tree" / ".hidden").write_text("not data")
    (data / "tree" / "ants" / ".thumbs").write_text("not data")
    files = sorted((data / "tree").glob("*/[0-9]*.png"))
    write_table(data / "mine.parquet", [f.read_bytes() for f in files], [f.parent.name for f in files])
    tree, table = load_task(mine(path="tree")), load_task(mine())
    assert tree.digest == table.digest
    assert tree.source == "images 'mine' (PNG folders)"
    assert load_images_task(mine(path=str(data / "tree"))).digest == tree.digest


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "ants" / "0.png").write_bytes(b"GIF8"), r"ants.0\.png: cannot be read as an image"),
        (lambda root: (root / "ants" / "a.txt").write_text("notes"), r"ants.a\.txt: cannot be read as an image"),
        (lambda root: (root / "empty").mkdir(), "class folder .*empty is empty"),
        (lambda root: [f.unlink() for f in (root / "ants").iterdir()], "class folder .*ants is empty"),
        (lambda root: shutil.rmtree(root / "ants"), "holds 1 class folders"),
        (lambda root: [shutil.rmtree(f) for f in root.iterdir()], "holds 0 class folders"),
        (
            lambda root: [f.unlink() for f in root.glob("*/[1-9].png")],
            "holds 2 images\n  expected: at least 8 \\+ 2 \\+ 2",
        ),
        (shutil.rmtree, "task data 'tree' not found\n  looked for: .*data/tree"),
    ],
)
def test_a_tree_that_is_no_task_is_refused(data, spoil, words):
    write_tree(data / "tree")
    spoil(data / "tree")
    with pytest.raises(DataError, match=words):
        load_task(mine(path="tree", rows=(9 if "a\\.txt" in words else 8, 2, 2)))


def test_training_rows_of_one_class_are_refused(data):
    order = numpy_generator("images-split", "mine").permutation(12)
    labels = ["rare" if i in order[:4] else "common" for i in range(12)]
    write_table(data / "mine.parquet", [encoded(x) for x in noise(12, 8)], labels)
    with pytest.raises(DataError, match="all training rows have one class"):
        load_task(mine())


@pytest.mark.skipif(REAL is None, reason="no CIFAR-10 on this machine: name its folder in ESPER_DATA or CIFAR10_DIR")
def test_real_cifar_loads_with_balanced_classes(monkeypatch):
    monkeypatch.setenv("ESPER_DATA", str(REAL))
    task = load_task(Cifar10Task(resolution=16, rows=(1000, 500, 1000), val_rows_per_epoch=100))
    assert task.source.startswith("CIFAR-10 (")
    assert task.source.endswith(" Parquet)")
    assert task.train.labels.bincount(minlength=10).min() > 70
    assert len(rows_of(task.train) | rows_of(task.val) | rows_of(task.test)) == 2500
