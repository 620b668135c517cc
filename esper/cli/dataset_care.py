"""`esper dataset verify|compact|vacuum`: what was sealed stays what it is, in few files and no more than needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from esper.cli.output import note, rich_table
from esper.cli.stores import known_dataset, open_folder
from esper.leyline.errors import EsperError, IntegrityError, SpecError

if TYPE_CHECKING:
    from esper.karn.store import Dataset, Store
    from esper.karn.vacuuming import Unused
    from esper.karn.versions import Version

Flag = Annotated[bool, Parameter(negative="")]

MIB = 2**20


def register(app: App) -> None:
    """Add the commands to `esper dataset`."""
    for command in (verify, compact, vacuum):
        app.command(command)


def verify(
    ref: str | None = None,
    /,
    *,
    all: Annotated[bool, Parameter(name="--all", negative="")] = False,
    repair: Flag = False,
    store: str | None = None,
) -> None:
    """Recompute sizes, hashes and the digest of a version; exit code 4 where anything differs.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        all: Every sealed version of the store instead.
        repair: Put back, byte for byte, the files whose bytes or rows the store still has; then verify again.
        store: Folder of the datasets.
    """
    if (ref is None) != all:
        raise SpecError("expected: one of NAME, NAME@n and --all")
    opened = open_folder(store)
    found: list[str] = []
    names: dict[str, None] = {}
    for wanted in [ref] if ref is not None else _every_version(opened):
        try:
            version = opened.resolve(wanted)
            found += _verify(opened, version, repair=repair)
            names[version.name] = None
        except IntegrityError as error:
            if ref is not None:
                raise
            found.append(f"{wanted}: {error}")
    for name in names:
        _note_unused(opened.dataset(name))
    if not found and not names:
        note(f"the store at {opened.place.show()} holds no sealed version")
    if found:
        raise IntegrityError("\n".join(found))


def _every_version(store: Store) -> list[str]:
    return [f"{name}@{number}" for name in store.names() for number in store.dataset(name).version_numbers()]


def _verify(store: Store, version: Version, *, repair: bool) -> list[str]:
    """Check one version, repair it where asked; return what is wrong with it now, and what to do."""
    from esper.karn import repairing

    problems = version.verify()
    if problems and repair:
        for item in repairing.repair(store, version, problems):
            note(f"{item.path}: " + (f"put back from {item.how}" if item.how else "nothing has its bytes or its rows"))
        problems = repairing.confirmed(version)
    if not problems:
        print(f"{version.ref} is sound: {len(version.manifest.files)} files, digest {version.manifest.digest}")
        return []
    todo = [repairing.regenerate(version)] if repair else repairing.advice(version, problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    heading = f"{version.ref} has {count}" + (" that could not be repaired" if repair else "")
    return [heading, *(f"  {problem}" for problem in problems), *(f"  to do: {line}" for line in todo)]


def _note_unused(dataset: Dataset) -> None:
    """What lies beside the data without belonging to them; where that cannot be told, why."""
    from esper.karn.vacuuming import unused_files

    try:
        unused = unused_files(dataset)
    except EsperError as error:
        note(f"note: the current tables of {dataset.name!r} cannot be read: {error}")
        return
    orphans = [file for file in unused if file.why == "orphan"]
    for file in orphans:
        note(f"note: {file.name} ({file.size:,} bytes) belongs to no commit: a running or interrupted writer's")
    replaced = len(unused) - len(orphans)
    if replaced:
        note(f"note: compaction replaced {replaced} files that nothing names any more")
    if unused:
        size = sum(file.size for file in unused)
        note(f"note: they are never read; `esper dataset vacuum {dataset.name}` removes them ({size:,} bytes) in time")


def compact(name: str, /, *, target_mib: float = 32, store: str | None = None) -> None:
    """Rewrite the many small files of a dataset's tables into few; what was sealed stays as it is.

    Writers may go on meanwhile. The old files stay until `vacuum`.

    Args:
        name: The dataset's name.
        target_mib: Size of a file, about, in MiB.
        store: Folder of the datasets.
    """
    from esper.karn.compaction import compact as rewrite

    if not target_mib > 0:
        raise SpecError(f"--target-mib {target_mib:g}\n  expected: above 0")
    rows = [
        [done.table, done.files_before, done.files_after, done.bytes_before, done.bytes_after, round(done.wall_s, 2)]
        for done in rewrite(known_dataset(open_folder(store), name), target_bytes=max(1, int(target_mib * MIB)))
    ]
    names = ["table", "files before", "files after", "bytes before", "bytes after", "seconds"]
    print(rich_table(names, rows), end="")


def vacuum(name: str, /, *, retain_hours: float = 24, dry_run: Flag = False, store: str | None = None) -> None:
    """Remove files that neither the current tables nor a sealed version names, and list them.

    Args:
        name: The dataset's name.
        retain_hours: How long a file is kept after it was replaced, or written by a writer that never committed it;
            below the time that a commit or a sealing takes, only while nobody else uses the dataset.
        dry_run: List what would be removed.
        store: Folder of the datasets.
    """
    from esper.karn import vacuuming

    dataset = known_dataset(open_folder(store), name)
    unused = vacuuming.unused_files(dataset, retain_hours=retain_hours)
    removed = [file for file in unused if file.is_old] if dry_run else vacuuming.remove(dataset, unused)
    if removed:
        rows = [[file.name, file.size, file.why] for file in removed]
        print(rich_table(["file", "bytes", "why"], rows), end="")
    word = "would be removed" if dry_run else "removed"
    print(f"{_sum(removed)} {word}")
    kept = [file for file in unused if not file.is_old]
    if kept:
        note(f"{_sum(kept)} that nothing names stay: they are younger than {retain_hours:g} h")


def _sum(files: list[Unused]) -> str:
    return f"{len(files):,} files, {sum(file.size for file in files):,} bytes"
