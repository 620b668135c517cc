"""Where named TOML and SQL files are found: an explicit path, then `./datasets`, then those that came with the code.

A name may be written with underscores in place of its hyphens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from esper.leyline.errors import SpecError, unknown_name
from esper.leyline.families import FamilySpec
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec, read_toml
from esper.leyline.specs import EnvironmentSpec

KINDS = {
    "matrices": "matrix",
    "environments": "environment",
    "families": "family",
    "rewards": "reward",
    "recipes": "recipe",
    "grids": "grid",
    "pipelines": "pipeline",
    "schedules": "service",
    "queries": "saved query",
    "views": "view",
}
"""Folder names and what one of their files is called."""

PLAIN_REWARD = "cifar10"
"""The reward of environments that have none of their own."""

AnySpec = TypeVar("AnySpec", bound=Spec)


def _folders(kind: str) -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    candidates = (Path("datasets"), package / "bundled", package.parent / "datasets")
    return [root / kind for root in candidates if (root / kind).is_dir()]


def names(kind: str, suffix: str = ".toml") -> list[str]:
    """Return the known names of a kind, one of KINDS."""
    return sorted({path.stem for folder in _folders(kind) for path in folder.glob(f"*{suffix}")})


def _path(kind: str, name: str, suffix: str = ".toml") -> Path | None:
    """The first file of a name, None where there is none."""
    candidates = (folder / f"{spelling}{suffix}" for spelling in (name, _hyphens(name)) for folder in _folders(kind))
    return next((path for path in candidates if path.is_file()), None)


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def find(kind: str, name: str, suffix: str = ".toml") -> Path:
    """Return the file of a name, or of a path that ends in the suffix; UnknownNameError where there is none."""
    if name.endswith(suffix) and Path(name).is_file():
        return Path(name)
    path = _path(kind, name, suffix)
    if path is not None:
        return path
    raise unknown_name(KINDS[kind], name, names(kind, suffix))


def load(kind: str, name: str, spec: type[AnySpec]) -> AnySpec:
    """Return a named specification."""
    return spec.from_toml(find(kind, name))


def load_environment(name: str) -> EnvironmentSpec:
    """Return the environment of a name, of a path that ends in `.toml`, or of a member of a family.

    Raises:
        UnknownNameError: There is no such environment; the error names the nearest.
        SpecError: The name is a whole family's, or a file is wrong.
    """
    found = load_environments(name)
    if len(found) == 1:
        return found[0]
    members = [member.name for member in found]
    listing = ", ".join(members) if len(members) <= 40 else f"{members[0]} to {members[-1]}"
    raise SpecError(f"{name!r} is a family of {len(found)} environments\n  expected: one of them: {listing}")


def load_environments(name: str) -> tuple[EnvironmentSpec, ...]:
    """Return the members of a family, or the one environment of a name, a path or a member's name.

    Raises:
        UnknownNameError: There is no such environment and no such family; the error names the nearest.
        SpecError: A file is wrong.
    """
    if name.endswith(".toml"):
        data = read_toml(Path(name))
        is_family = "environment" in data
        return FamilySpec.parse(data, name).environments() if is_family else (EnvironmentSpec.parse(data, name),)
    path = _path("environments", name)
    if path is not None:
        return (EnvironmentSpec.from_toml(path),)
    path = _path("families", name)
    if path is not None:
        return FamilySpec.from_toml(path).environments()
    family = family_of(name)
    members = load_environments(family) if family else ()
    for member in members:
        if member.name == _hyphens(name):
            return (member,)
    known = [*names("environments"), *names("families"), *(member.name for member in members)]
    raise unknown_name(KINDS["environments"], name, known)


def family_of(name: str) -> str | None:
    """Return the family whose member an environment's name can be, None without one."""
    found = [family for family in names("families") if _hyphens(name).startswith(f"{family}-")]
    return max(found, key=len, default=None)


def load_reward_of(environment: str) -> RewardSpec:
    """Return the reward named like an environment or else like its family; failing both, the plain one."""
    for name in (environment, family_of(environment)):
        path = _path("rewards", name) if name else None
        if path is not None:
            return RewardSpec.from_toml(path)
    return load("rewards", PLAIN_REWARD, RewardSpec)
