"""A sealed version as plain Parquet with a card, as the Hugging Face hub and anything that reads Parquet want it.

One configuration per table, one set of files per split of the version. Rows of no split, those of evaluation and
selection and of held-out environments outside the test, are in files of their own, `other`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esper.karn.card import card_markdown
from esper.karn.exchange import BATCH_ROWS, Report, silent, whole_or_nothing
from esper.karn.splits_stored import PARTS, StoredSplit, stored_split
from esper.karn.tables import COMMIT_COLUMNS
from esper.leyline.errors import IntegrityError
from esper.leyline.identity import Role
from esper.leyline.schema import SCHEMAS

if TYPE_CHECKING:
    from esper.karn.versions import Version

CONFIGURATIONS = ("steps", "episodes", "costs")
OTHER = "other"
ROWS_PER_FILE = 500_000


def export_parquet(
    version: Version, folder: Path, *, report: Report = silent, rows_per_file: int = ROWS_PER_FILE
) -> Path:
    """Write `data/TABLE/SPLIT-00000.parquet` and `README.md` into a new folder and return it.

    Args:
        version: The version.
        folder: Must not be there, or be empty.
        report: Told the rows that are written.
        rows_per_file: Most rows of a file.

    Raises:
        SpecError: The folder is there already and not empty.
        IntegrityError: A file of the version is missing or damaged.
        StoreError: The folder cannot be written.
    """
    split = stored_split(version)
    role = version.table("episodes", columns=["episode_id", "role"])
    learned = role.filter(pc.equal(role["role"], Role.DATA.value))["episode_id"].combine_chunks()
    with whole_or_nothing(folder) as temporary:
        written: dict[str, list[str]] = {}
        for table in CONFIGURATIONS:
            (temporary / "data" / table).mkdir(parents=True)
            with _Files(temporary / "data" / table, rows_per_file) as files:
                names = [name for name in SCHEMAS[table].names if name not in COMMIT_COLUMNS]
                for batch in version.batches(table, columns=names, batch_rows=BATCH_ROWS):
                    for part, rows in _parts(pa.Table.from_batches([batch]), split, learned):
                        files.write(part, rows)
                    report(batch.num_rows)
            written[table] = files.parts()
        (temporary / "README.md").write_text(_card(version, written), encoding="utf-8")
    return folder


def _parts(rows: pa.Table, split: StoredSplit, learned: pa.Array) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each split, and those of none."""
    held = pa.array(list(split.spec.held_out_environments), pa.string())
    is_held = pc.is_in(rows["environment"], held)
    left = pc.is_in(rows["episode_id"], learned)
    for part in PARTS:
        mine = pc.and_(left, pc.is_in(rows["env_seed"], pa.array(split.seeds(part), pa.int64())))
        if part != "test":
            mine = pc.and_(mine, pc.invert(is_held))
        if pc.any(mine).as_py():
            yield part, rows.filter(mine)
        left = pc.and_(left, pc.invert(mine))
        rows, is_held, left = _without(rows, mine, is_held, left)
    if rows.num_rows:
        yield OTHER, rows


def _without(
    rows: pa.Table, taken: pa.ChunkedArray, *columns: pa.ChunkedArray
) -> tuple[pa.Table, pa.ChunkedArray, pa.ChunkedArray]:
    keep = pc.invert(taken)
    first, second = (column.filter(keep) for column in columns)
    return rows.filter(keep), first, second


class _Files:
    """Writers of the files of one table, one open per split."""

    def __init__(self, folder: Path, rows_per_file: int) -> None:
        self._folder = folder
        self._rows_per_file = rows_per_file
        self._open: dict[str, tuple[pq.ParquetWriter, int]] = {}
        self._count: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for writer, _room in self._open.values():
            writer.close()

    def parts(self) -> list[str]:
        """The splits that have files, in the order of PARTS."""
        return [part for part in (*PARTS, OTHER) if part in self._count]

    def write(self, part: str, rows: pa.Table) -> None:
        """Append rows to the split's file, to a new one where it is full."""
        while rows.num_rows:
            if part not in self._open:
                self._open[part] = self._next(part, rows.schema)
            writer, room = self._open[part]
            writer.write_table(rows.slice(0, room))
            left = room - min(room, rows.num_rows)
            rows = rows.slice(room)
            if left:
                self._open[part] = (writer, left)
            else:
                writer.close()
                del self._open[part]

    def _next(self, part: str, schema: pa.Schema) -> tuple[pq.ParquetWriter, int]:
        number = self._count.get(part, 0)
        self._count[part] = number + 1
        path = self._folder / f"{part}-{number:05d}.parquet"
        return pq.ParquetWriter(path, schema, compression="zstd"), self._rows_per_file


def _card(version: Version, written: Mapping[str, list[str]]) -> str:
    """The version's card, its front matter with a list of files per split in place of one pattern per table."""
    patterns = {table: f"data/{table}/*.parquet" for table in written}
    text = card_markdown(version, files=patterns)
    for table, parts in written.items():
        line = f"  data_files: {json.dumps(patterns[table])}\n"
        if line not in text:
            raise IntegrityError(f"the card of {version.ref} names no files of {table!r}\n  report this")
        listed = "".join(
            f"  - split: {part}\n    path: {json.dumps(f'data/{table}/{part}-*.parquet')}\n" for part in parts
        )
        text = text.replace(line, f"  data_files:\n{listed}", 1)
    return text
