"""Where named TOML and SQL files are found: an explicit path, then `./datasets`, then those that came with the code."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from esper.leyline.errors import unknown_name
from esper.leyline.spec_base import Spec

KINDS = {
    "matrices": "matrix",
    "environments": "environment",
    "rewards": "reward",
    "recipes": "recipe",
    "pipelines": "pipeline",
    "queries": "saved query",
    "views": "view",
}
"""Folder names and what one of their files is called."""

AnySpec = TypeVar("AnySpec", bound=Spec)


def _folders(kind: str) -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    candidates = (Path("datasets"), package / "bundled", package.parent / "datasets")
    return [root / kind for root in candidates if (root / kind).is_dir()]


def names(kind: str, suffix: str = ".toml") -> list[str]:
    """Return the known names of a kind, one of KINDS."""
    return sorted({path.stem for folder in _folders(kind) for path in folder.glob(f"*{suffix}")})


def find(kind: str, name: str, suffix: str = ".toml") -> Path:
    """Return the file of a name, or of a path that ends in the suffix; UnknownNameError where there is none."""
    if name.endswith(suffix) and Path(name).is_file():
        return Path(name)
    for folder in _folders(kind):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise unknown_name(KINDS[kind], name, names(kind, suffix))


def load(kind: str, name: str, spec: type[AnySpec]) -> AnySpec:
    """Return a named specification."""
    return spec.from_toml(find(kind, name))
