"""What every export shares: results that appear whole or not at all, whole episodes in batches, rewards, progress."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from esper.leyline.errors import SpecError, StoreError
from esper.leyline.identity import Role
from esper.leyline.rewards import RewardSpec

if TYPE_CHECKING:
    from esper.karn.versions import Version

Report = Callable[[int], None]
"""Told how many more rows, episodes or bytes are done."""

BATCH_ROWS = 65_536
EPISODE_BATCH_ROWS = 16_384
"""Rows whose observations are encoded at a time: a view is wide, and is built from columns of doubles."""

LEARNABLE = (Role.DATA.value, Role.ONLINE.value)


def silent(_: int) -> None:
    """Report to nobody."""


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`, free for a file or a folder, that becomes `target` when the block ends well.

    Raises:
        SpecError: The target is there already and is no empty folder.
        StoreError: It cannot be written.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SpecError(f"{target} is there already\n  expected: a name that is free, or an empty folder")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(
            f"cannot write {target}: {error.strerror or error}\n  choose another folder with --to"
        ) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def rewards_of_version(version: Version) -> dict[str, RewardSpec]:
    """Return the reward of each environment, as the version's provenance has it (SpecError where it has none)."""
    found: Any = version.manifest.provenance.get("rewards")
    if not isinstance(found, dict) or not found:
        raise SpecError(
            f"{version.ref} does not say which rewards it was made with\n"
            "  expected: a version that `esper datagen` sealed; `--as parquet` needs no reward"
        )
    return {name: RewardSpec.parse(data, f"{version.ref}: rewards.{name}") for name, data in found.items()}


def learnable_episodes(version: Version) -> pa.Table:
    """Return the rows of `episodes` that learning may see: data and online, not failed, with a valid control.

    Raises:
        SpecError: There is none.
    """
    condition = pc.field("role").isin(list(LEARNABLE)) & (pc.field("outcome") != "failed") & pc.field("control_valid")
    episodes = version.table("episodes", filter=condition)
    if not episodes.num_rows:
        raise SpecError(f"{version.ref} has no episode to learn from\n  expected: one of role data that did not fail")
    return episodes


def whole_episodes(version: Version, columns: Sequence[str], wanted: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows of `steps` of the wanted episodes, in store order, never an episode in two tables.

    Args:
        version: The version.
        columns: What is needed beside `episode_id`.
        wanted: Rows of `episodes`.
    """
    ids = wanted["episode_id"].combine_chunks()
    names = list(dict.fromkeys(["episode_id", *columns]))
    held: pa.Table | None = None
    for batch in version.batches("steps", columns=names, batch_rows=EPISODE_BATCH_ROWS):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.is_in(rows["episode_id"], ids))
        rows = rows if held is None else pa.concat_tables([held, rows])
        if not rows.num_rows:
            continue
        last = rows["episode_id"][-1]
        open_rows = pc.sum(pc.equal(rows["episode_id"], last)).as_py()
        held = rows.slice(rows.num_rows - open_rows)
        if rows.num_rows > open_rows:
            yield rows.slice(0, rows.num_rows - open_rows)
    if held is not None and held.num_rows:
        yield held
