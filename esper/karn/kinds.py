"""Real and made-up episodes never share a dataset, and nothing learns from made-up ones."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esper.karn import delta
from esper.karn.store import Dataset
from esper.karn.versions import Version
from esper.leyline.errors import SpecError
from esper.leyline.schema import SCHEMAS

SKELETON_SOURCE = "skeleton"
"""`data_source` of made-up episodes: no data were read."""

SUFFIX = "-skeleton"
"""What the default name of a dataset of made-up episodes ends with."""


def is_skeleton(version: Version) -> bool:
    """Return whether a version's episodes are made up."""
    return version.manifest.provenance.get("skeleton") is True


def refuse_skeleton(version: Version) -> None:
    """Raise SpecError where a version's episodes are made up."""
    if is_skeleton(version):
        raise SpecError(
            f"{version.ref} holds made-up episodes (`esper datagen --skeleton`): no host was trained for them\n"
            "  expected: a dataset of real ones; `esper datagen` without --skeleton makes it"
        )


def refuse_mixture(dataset: Dataset, *, skeleton: bool) -> None:
    """Raise SpecError where a dataset holds episodes of the other kind.

    Args:
        dataset: Where episodes are to be stored.
        skeleton: Whether those are made up.
    """
    held = _holds_skeleton(dataset)
    if held is None or held == skeleton:
        return
    ours, theirs = ("made-up", "real") if skeleton else ("real", "made-up")
    raise SpecError(
        f"dataset {dataset.name!r} holds {theirs} episodes, and {ours} ones never join them\n"
        "  choose another name: --dataset NAME"
    )


def refuse_mixed_tables(dataset: Dataset, tables: Mapping[str, pa.Table]) -> None:
    """Raise SpecError where the tables' episodes are of another kind than those that a dataset holds."""
    sources = tables["episodes"]["data_source"].drop_null()
    if len(sources):
        refuse_mixture(dataset, skeleton=pc.any(pc.equal(sources, SKELETON_SOURCE)).as_py())


def _holds_skeleton(dataset: Dataset) -> bool | None:
    """Whether the episodes in the tables are made up, None where none has run yet; all are of one kind."""
    if not all(delta.exists(dataset.place.child(table)) for table in SCHEMAS):
        return None
    for name in delta.current_files(dataset.place)["episodes"][1]:
        path = dataset.place.fetch(name)
        with delta.delta_errors(path):
            if "data_source" not in pq.read_schema(path).names:
                return False
            sources = pq.read_table(path, columns=["data_source"], partitioning=None)["data_source"].drop_null()
        if len(sources):
            return bool(pc.any(pc.equal(sources, SKELETON_SOURCE)).as_py())
    return None
