"""`esper dataset`: what a store holds, what is in a version, and the care of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from esper.cli import dataset_care, dataset_exchange, dataset_splits
from esper.cli.output import Format, choose_format, note, rich_table, write_table, write_text
from esper.cli.stores import known_dataset, open_folder
from esper.leyline.errors import SpecError, StoreError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from esper.karn.diffing import Difference
    from esper.karn.store import Dataset
    from esper.karn.versions import Version

dataset = App(
    name="dataset",
    help="Datasets and their sealed versions: list, show, compare, verify, split, compact, describe.",
    result_action="return_value",
)
dataset_care.register(dataset)
dataset_splits.register(dataset)
dataset_exchange.register(dataset)

MIB = 2**20
MAX_VALUE_CHARACTERS = 60

_CELLS = """
SELECT environment, role, controller, epsilon, episodes, env_seeds, distinct_histories, rolled_back, diverged, failed,
    control_invalid, mean_gain_points, mean_test_gain_points, mean_fossils
FROM cells ORDER BY environment, role, controller, epsilon
"""


@dataset.command
def ls(*, store: str | None = None) -> None:
    """List the datasets of a store and their sealed versions.

    Args:
        store: Folder of the datasets, or s3://bucket/prefix (default: $ESPER_STORE, else datasets/local).
    """
    opened = open_folder(store)
    rows: list[list[object]] = []
    for name in opened.names():
        versions = opened.dataset(name).versions()
        rows += [_line(version) for version in versions] or [[name, *[None] * 7, "not sealed"]]
    if not rows:
        note(f"the store at {opened.place.show()} holds no dataset; `esper datagen` makes one")
        return
    names = ["version", "episodes", "env_seeds", "failed", "matrix", "digest", "MiB", "sealed", "offline-rl"]
    print(rich_table(names, rows), end="")


def _line(version: Version) -> list[object]:
    manifest = version.manifest
    counts = manifest.counts
    sizes = [counts["episodes"], counts["env_seeds"], counts["failed"]]
    told = [manifest.matrix_id, manifest.digest[:16], round(_size(version) / MIB, 1), manifest.created_at]
    return [version.ref, *sizes, *told, f"{_levels(version)[1][1]}{_made_up(version)}"]


def _size(version: Version) -> int:
    return sum(entry.size for entry in version.manifest.files)


def _made_up(version: Version) -> str:
    return " (SKELETON)" if version.manifest.provenance.get("skeleton") else ""


def _levels(version: Version) -> list[tuple[str, str]]:
    from esper.leyline.verdict import Use

    verdict = version.verdict()
    return [(use.value, verdict.level(use).value if verdict else "not checked") for use in Use]


@dataset.command
def versions(name: str, /, *, store: str | None = None) -> None:
    """List the sealed versions of a dataset, and what each has more or less than the one before.

    Args:
        name: The dataset's name.
        store: Folder of the datasets.
    """
    found = known_dataset(open_folder(store), name).versions()
    if not found:
        note(f"dataset {name!r} has no sealed version; `esper datagen` seals one when it is complete")
        return
    rows = [_history(version, before) for version, before in zip(found, [None, *found])]
    uses = [use for use, _ in _levels(found[0])]
    columns = ["version", "episodes", "since the one before", "digest", "sealed", "matrix", "files", "MiB", *uses]
    print(rich_table(columns, rows), end="")


def _history(version: Version, before: Version | None) -> list[object]:
    manifest = version.manifest
    changes = [
        f"{count - before.manifest.counts.get(what, 0):+,} {what.replace('_', ' ')}"
        for what, count in manifest.counts.items()
        if before is not None and count != before.manifest.counts.get(what, 0)
    ]
    told = ", ".join(changes) or ("first" if before is None else "the same counts")
    sizes = [len(manifest.files), round(_size(version) / MIB, 1)]
    start = [f"{version.ref}{_made_up(version)}", manifest.counts["episodes"], told]
    levels = [level for _, level in _levels(version)]
    return [*start, manifest.digest[:16], manifest.created_at, manifest.matrix_id, *sizes, *levels]


@dataset.command
def show(ref: str, /, *, store: str | None = None) -> None:
    """Show what a version holds: its manifest, its cells, its verdict, and how far its dataset is.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        store: Folder of the datasets.
    """
    from esper.karn.catalogue import query

    opened = open_folder(store)
    if "@" not in ref and not (found := known_dataset(opened, ref)).version_numbers():
        note(f"dataset {ref!r} is not sealed yet; `esper datagen` seals it when it is complete")
        _progress(found, whole=True)
        return
    version = opened.resolve(ref)
    print(rich_table(["", "value"], _facts(version)), end="")
    cells = query(version, _CELLS)
    print(rich_table(cells.column_names, [list(row.values()) for row in cells.to_pylist()]), end="")
    _progress(opened.dataset(version.name), whole=False)
    verdict = version.verdict()
    poor = [check for check in verdict.checks if check.level.value in ("warn", "block")] if verdict else []
    for check in poor:
        note(f"{check.level.value}: {check.environment}: {check.name}: {check.message}")
    if _made_up(version):
        note(f"{version.ref} is SKELETON data: every number in it is made up")


def _facts(version: Version) -> list[tuple[str, str]]:
    from esper.karn.splits_stored import split_names

    manifest = version.manifest
    return [
        ("version", f"{version.ref}{_made_up(version)}"),
        ("digest", manifest.digest),
        ("sealed", manifest.created_at),
        ("matrix", manifest.matrix_id),
        ("schema version", str(manifest.schema_version)),
        ("code commits", ", ".join(manifest.code_commits)),
        ("files", f"{len(manifest.files)}, {_size(version) / MIB:.1f} MiB"),
        *((name.replace("_", " "), f"{count:,}") for name, count in manifest.counts.items()),
        *((f"verdict for {use}", level) for use, level in _levels(version)),
        ("stored splits", ", ".join(split_names(version)) or "none yet"),
        *(
            (name.replace("_", " "), _brief(value))
            for name, value in manifest.provenance.items()
            if name not in ("code_commit", "planned")
        ),
        ("manifest", version.location),
    ]


def _progress(of: Dataset, *, whole: bool) -> None:
    """What is done of the newest plan on record: every cell, or those that lack something, or the environments."""
    from esper.karn.progress_table import progress, progress_line, summed

    table = progress(of)
    if not table.num_rows:
        return
    lacking = [list(row.values()) for row in table.to_pylist() if whole or row["failed"] or row["remaining"]]
    shown = table if lacking else summed(table, ["environment"])
    rows = lacking or [list(row.values()) for row in shown.to_pylist()]
    print(rich_table(shown.column_names, rows, title="plan on record"), end="")
    note(f"plan on record: {progress_line(table)}")


def _brief(value: JsonValue) -> str:
    """Provenance in one short line: what is nested is named, not written out."""
    if isinstance(value, list):
        return "; ".join(_brief(item) for item in value)
    if not isinstance(value, dict):
        return str(value)
    if any(isinstance(item, (dict, list)) for item in value.values()):
        return str(value.get("name", ", ".join(value)))
    return ", ".join(f"{name} {item}" for name, item in value.items())


@dataset.command
def diff(
    old: str, new: str, /, *, output: Path | None = None, format: Format | None = None, store: str | None = None
) -> None:
    """Say what differs between two versions, of one dataset or of two: episodes, cells, provenance.

    Rows are compared by the columns that the digest covers.

    Args:
        old: NAME or NAME@n.
        new: NAME or NAME@n.
        output: File for the list of episodes that were added, removed or changed (.csv, .json or .parquet).
        format: Of the file: table, csv, json or parquet (default: what its suffix says).
        store: Folder of the datasets.
    """
    from esper.karn.diffing import diff as compare

    if format is not None and output is None:
        raise SpecError("--format is of the list of episodes\n  expected: with --output FILE")
    opened = open_folder(store)
    before, after = opened.resolve(old), opened.resolve(new)
    found = compare(before, after)
    changes = {change: found.num_episodes(change) for change in ("added", "removed", "changed")}
    if not found.episodes.num_rows:
        print(f"no episode differs between {before.ref} and {after.ref}")
    else:
        told = ", ".join(f"{count:,} {change}" for change, count in changes.items())
        print(f"episodes from {before.ref} to {after.ref}: {told}")
        print(rich_table(found.cells.column_names, [list(row.values()) for row in found.cells.to_pylist()]), end="")
    _print_facts(found, before.ref, after.ref)
    if output is not None:
        write_table(found.episodes, choose_format(format, output), output)


def _print_facts(found: Difference, old: str, new: str) -> None:
    rows: list[list[str | None]] = [list(fact) for fact in found.facts]
    rows += [[key, *(_short(value) for value in pair)] for key, *pair in found.provenance]
    if rows:
        print(rich_table(["", old, new], rows), end="")


def _short(value: str | None) -> str | None:
    """A value as far as a table has room for it."""
    if value is None or len(value) <= MAX_VALUE_CHARACTERS:
        return value
    return value[: MAX_VALUE_CHARACTERS - 1] + "…"


@dataset.command
def card(ref: str, /, *, output: Path | None = None, store: str | None = None) -> None:
    """Write the card of a version: provenance, coverage, verdict, splits, schema, how to load it, known limits.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        output: A file that ends in .md or .html (default: Markdown on stdout).
        store: Folder of the datasets.
    """
    from esper.karn.card import card_html, card_markdown

    if output is not None and output.suffix not in (".md", ".html"):
        raise SpecError(f"a card in {output.name!r}\n  expected: a file that ends in .md or .html")
    version = open_folder(store).resolve(ref)
    if output is not None and output.is_dir():
        raise StoreError(f"cannot write {output}: it is a folder")
    write_text(
        card_html(version) if output is not None and output.suffix == ".html" else card_markdown(version), output
    )
