"""`esper dataset splits|stats`: the stored splits of a version, and what is in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from esper.cli.output import Format, choose_format, note, rich_table, write_table
from esper.cli.stores import open_folder
from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from esper.karn.splits_stored import Part, SplitSpec, StoredSplit

Words = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)]
Numbers = Annotated[list[float] | None, Parameter(negative="", consume_multiple=True)]
Flag = Annotated[bool, Parameter(negative="")]


def register(app: App) -> None:
    """Add the commands to `esper dataset`."""
    for command in (splits, stats):
        app.command(command)


def splits(
    ref: str,
    /,
    *,
    name: str = "default",
    fractions: Numbers = None,
    hold_out_environments: Words = None,
    store: str | None = None,
) -> None:
    """Show a split of a version by environment seed; it is drawn and stored the first time, and never changes.

    Training uses the default split. No environment seed is in two splits, whatever environments share it; rows of a
    held-out environment are used for the test alone.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        name: The split's name.
        fractions: Shares of each environment's seeds for training, validation and test (default: 0.85 0.15 0).
        hold_out_environments: Environments that nothing is learned from.
        store: Folder of the datasets.
    """
    from esper.karn.splits_stored import FEWEST_SEEDS, find_split, split_names, stored_split

    spec = _spec(fractions, hold_out_environments)
    version = open_folder(store).resolve(ref)
    split = find_split(version, name) if spec is None else stored_split(version, name, spec)
    print(rich_table(["split", "env_seeds", "share"], _sizes(split)), end="")
    note(f"split {split.name!r} of {version.ref}: {split.spec.show()}")
    wanted: dict[Part, float] = {"validation": split.spec.validation_fraction, "test": split.spec.test_fraction}
    if empty := [part for part, share in wanted.items() if share > 0 and not split.seeds(part)]:
        note(f"no seed for {' and '.join(empty)}: an environment with fewer than {FEWEST_SEEDS} seeds keeps them all")
    if others := [other for other in split_names(version) if other != name]:
        note(f"other splits: {', '.join(others)}")


def _spec(fractions: Sequence[float] | None, hold_out: Sequence[str] | None) -> SplitSpec | None:
    """How to draw, None where nothing was asked for."""
    from esper.karn.splits_stored import SplitSpec

    if fractions is None and hold_out is None:
        return None
    held = tuple(sorted(set(hold_out or ())))
    if fractions is None:
        return SplitSpec(held_out_environments=held)
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        told = " ".join(f"{fraction:g}" for fraction in fractions)
        raise SpecError(
            f"--fractions {told}\n  expected: three shares that sum to 1, training above 0, for example 0.7 0.15 0.15"
        )
    return SplitSpec(validation_fraction=fractions[1], test_fraction=fractions[2], held_out_environments=held)


def _sizes(split: StoredSplit) -> list[list[object]]:
    from esper.karn.splits_stored import PARTS

    total = sum(len(split.seeds(part)) for part in PARTS)
    return [[part, len(split.seeds(part)), len(split.seeds(part)) / max(total, 1)] for part in PARTS]


def stats(
    ref: str,
    /,
    *,
    name: str = "default",
    features: Flag = False,
    output: Path | None = None,
    format: Format | None = None,
    store: str | None = None,
) -> None:
    """Statistics per split and environment: sizes, return under the data's reward, shares of each op.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        name: The split's name.
        features: Mean, standard deviation, range and missing share of every observed feature instead.
        output: File to write to (.csv, .json or .parquet say the format).
        format: table, csv, json or parquet.
        store: Folder of the datasets.
    """
    from esper.karn.split_statistics import feature_statistics, split_statistics
    from esper.karn.splits_stored import find_split

    version = open_folder(store).resolve(ref)
    split = find_split(version, name)
    found = feature_statistics(version, split) if features else split_statistics(version, split)
    write_table(found, choose_format(format, output), output)
    note(f"split {split.name!r} of {version.ref}: {split.spec.show()}")
