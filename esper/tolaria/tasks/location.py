"""Where task data lie on this machine: the data folder, and the cache for what is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from esper.leyline.errors import DataError
from esper.leyline.folders import CACHE_VARIABLE, cache_folder

__all__ = ["CACHE_VARIABLE", "DATA_VARIABLE", "cache_folder", "data_folder", "locate", "set_data_folder"]

DATA_VARIABLE = "ESPER_DATA"


def set_data_folder(path: str | Path | None) -> None:
    """Make `path` the data folder of this process and of the processes that it starts; None leaves it as it is.

    Raises:
        DataError: There is no such folder.
    """
    if path is None:
        return
    os.environ[DATA_VARIABLE] = str(_checked(Path(path).expanduser(), "the data folder").resolve())


def data_folder() -> Path | None:
    """Return the data folder, None where none was named; DataError where the named one does not exist."""
    named = os.environ.get(DATA_VARIABLE)
    return _checked(Path(named).expanduser(), f"${DATA_VARIABLE}") if named else None


def locate(path: str) -> Path:
    """Return an absolute path, or one below the data folder or the working directory, in this order.

    Raises:
        DataError: Nothing is there.
    """
    given = Path(path).expanduser()
    folder = data_folder()
    roots = [Path()] if folder is None else [folder, Path()]
    candidates = [given] if given.is_absolute() else [root / given for root in roots]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise DataError(
        f"task data {path!r} not found\n  looked for: {looked}\n"
        f"  name the data folder in ${DATA_VARIABLE} or with --data"
    )


def _checked(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{what} {str(folder)!r} is not a folder\n  expected: the folder that holds the task data")
    return folder
