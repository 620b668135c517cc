"""`esper dataset`: list, show and verify sealed versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cyclopts import App

from esper.cli.output import note, rich_table
from esper.leyline.errors import IntegrityError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from esper.karn.versions import Version

dataset = App(name="dataset", help="List, show and verify datasets.", result_action="return_value")

_CELLS = """
SELECT environment, role, controller, epsilon, episodes, env_seeds, distinct_histories, rolled_back, diverged, failed,
    control_invalid, mean_gain_points, mean_test_gain_points, mean_fossils
FROM cells ORDER BY environment, role, controller, epsilon
"""


@dataset.command
def ls(*, store: str | None = None) -> None:
    """List the datasets of a store and their sealed versions.

    Args:
        store: Folder of the datasets (default: $ESPER_STORE, else datasets/local).
    """
    from esper.karn.store import open_store

    opened = open_store(store)
    rows: list[list[object]] = []
    for name in opened.names():
        versions = opened.dataset(name).versions()
        rows += [_line(version) for version in versions] or [[name, *[None] * 6, "not sealed"]]
    if not rows:
        note(f"the store at {opened.root} holds no dataset; `esper datagen` makes one")
        return
    names = ["version", "episodes", "env_seeds", "failed", "matrix", "digest", "sealed", "offline-rl"]
    print(rich_table(names, rows), end="")


def _line(version: Version) -> list[object]:
    manifest = version.manifest
    counts = manifest.counts
    sizes = [counts["episodes"], counts["env_seeds"], counts["failed"]]
    return [version.ref, *sizes, manifest.matrix_id, manifest.digest[:16], manifest.created_at, _levels(version)[1][1]]


def _levels(version: Version) -> list[tuple[str, str]]:
    from esper.leyline.verdict import Use

    verdict = version.verdict()
    return [(use.value, verdict.level(use).value if verdict else "not checked") for use in Use]


@dataset.command
def show(ref: str, /, *, store: str | None = None) -> None:
    """Show what a version holds: its manifest, its cells and its verdict.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        store: Folder of the datasets.
    """
    from esper.karn.catalogue import query
    from esper.karn.store import open_store

    version = open_store(store).resolve(ref)
    manifest = version.manifest
    size = sum(entry.size for entry in manifest.files)
    facts = [
        ("version", version.ref),
        ("digest", manifest.digest),
        ("sealed", manifest.created_at),
        ("matrix", manifest.matrix_id),
        ("schema version", manifest.schema_version),
        ("code commits", ", ".join(manifest.code_commits)),
        ("files", f"{len(manifest.files)}, {size / 2**20:.1f} MiB"),
        *((name.replace("_", " "), f"{count:,}") for name, count in manifest.counts.items()),
        *((f"verdict for {use}", level) for use, level in _levels(version)),
        *(
            (name.replace("_", " "), _brief(value))
            for name, value in manifest.provenance.items()
            if name != "code_commit"
        ),
        ("manifest", version.path),
    ]
    print(rich_table(["", "value"], facts), end="")
    cells = query(version, _CELLS)
    print(rich_table(cells.column_names, [list(row.values()) for row in cells.to_pylist()]), end="")
    verdict = version.verdict()
    poor = [check for check in verdict.checks if check.level.value in ("warn", "block")] if verdict else []
    for check in poor:
        note(f"{check.level.value}: {check.environment}: {check.name}: {check.message}")


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
def verify(ref: str, /, *, store: str | None = None) -> None:
    """Recompute sizes, hashes and the digest of a version; exit code 4 where anything differs.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        store: Folder of the datasets.
    """
    from esper.karn.store import open_store

    opened = open_store(store)
    version = opened.resolve(ref)
    problems = version.verify()
    for path in opened.dataset(version.name).orphan_files():
        note(f"note: {path} belongs to no commit (an interrupted writer left it); it is never read")
    if problems:
        listing = "\n  ".join(problems)
        raise IntegrityError(f"{version.ref} has {len(problems)} problems\n  {listing}")
    print(f"{version.ref} is sound: {len(version.manifest.files)} files, digest {version.manifest.digest}")
