"""The store and the datasets that a command's arguments name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.leyline.errors import SpecError, unknown_name

if TYPE_CHECKING:
    from esper.karn.store import Dataset, Store


def open_folder(store: str | None) -> Store:
    """Return the store; SpecError where it is a file."""
    from esper.karn.store import open_store

    opened = open_store(store)
    if opened.place.storage_options is None and opened.root.is_file():
        raise SpecError(
            f"the store at {opened.root} is a file\n  expected: a folder of datasets, or s3://bucket/prefix"
        )
    return opened


def known_dataset(store: Store, name: str) -> Dataset:
    """Return a dataset that exists (SpecError where `name` is none's, or names a version)."""
    from esper.karn.manifest import check_dataset_name

    if "@" in name:
        raise SpecError(f"{name!r} is a version\n  expected: the dataset's name, {name.partition('@')[0]!r}")
    known = store.names()
    if check_dataset_name(name) not in known:
        error = unknown_name("dataset", name, known)
        raise type(error)(f"{error}\n  store: {store.place.show()}; `esper datagen` makes one")
    return store.dataset(name)
