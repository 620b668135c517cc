"""`esper dataset export|import`: a sealed version in the formats of others, and as one file for another store."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from esper.cli.output import note
from esper.cli.stores import open_folder
from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from esper.karn.exchange import Report
    from esper.karn.versions import Version

Kind = Literal["parquet", "minari", "d3rlpy", "archive"]


def register(app: App) -> None:
    """Add the commands to `esper dataset`."""
    app.command(export_version, name="export")
    app.command(import_version, name="import")


def export_version(
    ref: str,
    /,
    *,
    to: Path,
    kind: Annotated[Kind, Parameter(name="--as")],
    view: str = "v4",
    store: str | None = None,
) -> None:
    """Write a sealed version for others; what is begun and not ended leaves nothing behind.

    parquet: plain Parquet by table and split, and a card, for the Hugging Face hub. minari: a Minari data set,
    esper/NAME-vN, in the folder that $MINARI_DATASETS_PATH will name. d3rlpy: a replay buffer, NAME-n.h5, with its list
    of actions. archive: everything of the version in one file, which `esper dataset import` checks and takes in.

    Args:
        ref: NAME or NAME@n (the latest version of NAME).
        to: Folder to write into. An archive or a replay buffer may also be named: FILE.tar, FILE.tar.zst, FILE.h5.
        kind: parquet, minari, d3rlpy or archive.
        view: Observation view of minari and d3rlpy.
        store: Folder of the datasets, or s3://bucket/prefix (default: $ESPER_STORE, else datasets/local).
    """
    from esper.leyline.views import get_view

    get_view(view)
    version = open_folder(store).resolve(ref)
    _check_outside(version, to)
    manifest = version.manifest
    rows = manifest.counts.get("decisions", 0) + manifest.counts.get("episodes", 0)
    if kind == "parquet":
        from esper.karn.exchange_parquet import export_parquet

        with _progress("rows", 2 * rows) as report:
            path = export_parquet(version, to, report=report)
    elif kind == "minari":
        from esper.karn.exchange_minari import dataset_id, export_minari

        with _progress("episodes", manifest.counts.get("episodes", 0)) as report:
            path = export_minari(version, to, view=view, report=report)
        note(f"MINARI_DATASETS_PATH={to} python -c \"import minari; minari.load_dataset('{dataset_id(version)}')\"")
    elif kind == "d3rlpy":
        path = _export_d3rlpy(version, to, view)
    else:
        from esper.karn.exchange_archive import export_archive

        with _progress("bytes", sum(entry.size for entry in manifest.files)) as report:
            path = export_archive(version, to, report=report)
    if manifest.provenance.get("skeleton"):
        note(f"note: {version.ref} is skeleton data, every number in it is made up; the export says so")
    print(f"{version.ref} written to {path}")


def _export_d3rlpy(version: Version, to: Path, view: str) -> Path:
    from esper.karn.exchange import rewards_of_version
    from esper.simic.d3rlpy_export import export_d3rlpy

    path = to if to.suffix == ".h5" else to / f"{version.name}-{version.number}.h5"
    export_d3rlpy(version, path, view=view, rewards=rewards_of_version(version))
    return path


def _check_outside(version: Version, to: Path) -> None:
    """Nothing is written where the store keeps its datasets."""
    root = version.root.resolve().parent
    if to.resolve() == root or root in to.resolve().parents:
        raise SpecError(f"--to {to} lies in the store at {root}\n  expected: a folder elsewhere")


def import_version(archive: Path, /, *, name: str | None = None, store: str | None = None) -> None:
    """Take a version from an archive into a store, after checking every hash in it.

    It keeps its number in a store that does not have the dataset, and gets the next one where the dataset has older
    versions. An equal version that is there already is left as it is; other rows under its name are refused.

    Args:
        archive: What `esper dataset export --as archive` wrote.
        name: Another name for the dataset.
        store: Folder of the datasets, or s3://bucket/prefix.
    """
    from esper.karn.exchange_archive import import_archive

    try:
        size = archive.stat().st_size
    except OSError as error:
        raise SpecError(f"cannot read {archive}: {error.strerror}\n  expected: an archive") from None
    opened = open_folder(store)
    with _progress("bytes", size) as report:
        version = import_archive(opened, archive, name=name, report=report)
    print(f"{version.ref} in {opened.place.show()}, digest {version.manifest.digest}")


@contextlib.contextmanager
def _progress(unit: str, total: int) -> Iterator[Report]:
    """Yield what shows progress on stderr, in a terminal; silent elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
