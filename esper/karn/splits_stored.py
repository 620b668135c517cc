"""Splits of a sealed version by environment seed, drawn once and stored beside its manifest.

An environment seed is in one split only, in all environments that share it: episodes of one seed share rows, initial
weights and data order. STORE/NAME/versions/n.splits.json is the default split, n.splits.OTHER.json one of another name.
The draw is keyed, so whoever draws first draws the same; what is stored is bound to the version by its digest.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from esper.leyline.errors import IntegrityError, SpecError, StoreError, nearest, unknown_name
from esper.leyline.identity import Role
from esper.leyline.keys import derive_seed
from esper.leyline.spec_base import Spec

if TYPE_CHECKING:
    from esper.karn.versions import Version

Part = Literal["train", "validation", "test"]

PARTS: tuple[Part, ...] = ("train", "validation", "test")
DEFAULT_NAME = "default"
VALIDATION_FRACTION = 0.15
FEWEST_SEEDS = 4
"""Of an environment with fewer environment seeds none is held out."""

_NAME = re.compile(r"^[a-z0-9-]{1,40}$")
_KEY = "held out"


class SplitSpec(Spec):
    """How to draw: shares of each environment's seeds, and the environments that nothing is learned from.

    Evaluation has environment seeds of its own (replicates from 200,000), so the default holds none back as a test.
    """

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = VALIDATION_FRACTION
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    held_out_environments: tuple[str, ...] = ()

    def show(self) -> str:
        """Return it in words."""
        train = 1 - self.validation_fraction - self.test_fraction
        held = f", holding out {', '.join(self.held_out_environments)}" if self.held_out_environments else ""
        return f"fractions {train:g} {self.validation_fraction:g} {self.test_fraction:g}{held}"


class StoredSplit(Spec):
    """The environment seeds of each split of one sealed version.

    Rows of a held-out environment are used where their environment seed is in `test`, and nowhere else.
    """

    dataset: str
    version: int
    digest: str
    name: str
    spec: SplitSpec
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    def seeds(self, part: Part) -> tuple[int, ...]:
        """Return the environment seeds of a split, ascending."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]

    def part_of(self, environment: str, env_seed: int) -> Part | None:
        """Return the split of a row; None where it belongs to none."""
        part = next((name for name in PARTS if env_seed in self.seeds(name)), None)
        return None if environment in self.spec.held_out_environments and part != "test" else part


def stored_split(version: Version, name: str = DEFAULT_NAME, spec: SplitSpec | None = None) -> StoredSplit:
    """Return a version's split, drawn and stored now unless it is there; any number of processes may do this at once.

    The default split of a store that cannot be written is drawn and not stored: it would be the same again.

    Args:
        version: The sealed version.
        name: The split's name.
        spec: How to draw; what is stored, or else the default draw, where None.

    Raises:
        SpecError: A split of that name is stored and was drawn otherwise, or the draw is impossible.
        UnknownNameError: An environment that the version does not have.
        IntegrityError: What is stored is damaged, or was drawn for other data.
        StoreError: The store cannot be written.
    """
    check_split_name(name)
    found = read_split(version, name)
    if found is None:
        drawn = draw_split(version, name, spec or SplitSpec())
        is_default = name == DEFAULT_NAME and drawn.spec == SplitSpec()
        with contextlib.suppress(*([StoreError] if is_default else [])):
            version.place.write_new(_file(version, name), json.dumps(drawn.model_dump(mode="json"), indent=1))
        found = read_split(version, name) or drawn
    if spec is not None and found.spec != spec:
        raise SpecError(
            f"{version.ref} has a split {name!r} already: {found.spec.show()}\n"
            f"  asked for: {spec.show()}; a stored split never changes: give the new one a name with --name"
        )
    return found


def read_split(version: Version, name: str = DEFAULT_NAME) -> StoredSplit | None:
    """Return a stored split, None where there is none.

    Raises:
        IntegrityError: It is damaged, or was drawn for other data.
    """
    if _file(version, name) not in version.place.names("versions"):
        return None
    where = f"{version.place.show()}/{_file(version, name)}"
    try:
        split = StoredSplit.model_validate_json(version.place.read_text(_file(version, name)))
    except ValidationError as error:
        raise IntegrityError(
            f"{where} is damaged: {error.errors()[0]['msg']}\n"
            "  restore it; or remove it and the same seeds are drawn again"
        ) from None
    mine = (version.name, version.number, version.manifest.digest)
    if (split.dataset, split.version, split.digest) != mine:
        raise IntegrityError(
            f"{where} is of {split.dataset}@{split.version} with digest {split.digest[:16]}…\n"
            f"  expected: {version.ref} with digest {mine[2][:16]}…; remove it and it is drawn again"
        )
    return split


def split_names(version: Version) -> list[str]:
    """Return the names of the stored splits of a version."""
    pattern = re.compile(rf"^versions/{version.number}\.splits(?:\.([a-z0-9-]+))?\.json$")
    matches = [pattern.match(name) for name in version.place.names("versions")]
    return sorted(match[1] or DEFAULT_NAME for match in matches if match)


def check_split_name(name: str) -> str:
    """Return the name, or raise SpecError where it is no name of a split."""
    if not _NAME.match(name):
        raise SpecError(f"split name {name!r} is not allowed\n  expected: 1 to 40 of a-z, 0-9 and '-'")
    return name


def find_split(version: Version, name: str = DEFAULT_NAME) -> StoredSplit:
    """Return a split by name: the default one is drawn at first need, any other must be stored (UnknownNameError)."""
    check_split_name(name)
    if name != DEFAULT_NAME and name not in (known := split_names(version)):
        close = nearest(name, [*known, DEFAULT_NAME])
        error = unknown_name("split", name, sorted({*known, DEFAULT_NAME}))
        raise type(error)(f"{error}\n  of {version.ref}; `esper dataset splits {version.ref} --name {close or name}`")
    return stored_split(version, name)


def draw_split(version: Version, name: str, spec: SplitSpec) -> StoredSplit:
    """Return the split of a version's data-role environment seeds; the same for the same seeds always.

    Seeds whose episodes all failed or have no valid control count for no share; they are in `train` unless another
    environment holds them out. Seeds that occur in held-out environments alone are `test`.

    Raises:
        SpecError: Shares that leave nothing to train on, or held-out environments without any test seed.
        UnknownNameError: An environment that the version does not have.
    """
    if spec.validation_fraction + spec.test_fraction >= 1:
        raise SpecError(f"{spec.show()} leaves nothing to train on\n  expected: three shares whose first is above 0")
    columns = ["environment", "env_seed", "control_valid", "outcome"]
    of_data = pc.field("role") == Role.DATA.value
    rows = version.table("episodes", columns=columns, filter=of_data)
    known = pc.unique(rows["environment"]).to_pylist()
    for environment in spec.held_out_environments:
        if environment not in known:
            raise unknown_name(f"environment of {version.ref}", environment, known)
    held_out = pa.array(list(spec.held_out_environments), pa.string())
    learned = rows.filter(pc.invert(pc.is_in(rows["environment"], held_out)))
    usable = learned.filter(pc.and_(learned["control_valid"], pc.not_equal(learned["outcome"], "failed")))
    seeds: dict[str, set[int]] = {}
    for environment, seed in zip(usable["environment"].to_pylist(), usable["env_seed"].to_pylist(), strict=True):
        seeds.setdefault(environment, set()).add(seed)
    validation, test = draw(seeds, spec.validation_fraction, spec.test_fraction)
    everywhere = set(rows["env_seed"].to_pylist())
    test |= everywhere - set(learned["env_seed"].to_pylist())
    if spec.held_out_environments and not test:
        raise SpecError(
            "held-out environments share all their environment seeds with the others, and no seed is kept for a test\n"
            "  expected: a share for the test, for example --fractions 0.7 0.15 0.15"
        )
    return StoredSplit(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        name=name,
        spec=spec,
        train=tuple(sorted(everywhere - validation - test)),
        validation=tuple(sorted(validation)),
        test=tuple(sorted(test)),
    )


def draw(
    seeds: Mapping[str, Sequence[int] | set[int]], validation_fraction: float, test_fraction: float = 0.0
) -> tuple[set[int], set[int]]:
    """Return the environment seeds to validate on and those to test on, from each environment's seeds.

    Of every environment with at least FEWEST_SEEDS seeds a share is held out, one at least where the share is above 0.
    A seed that is held out in one environment is held out in all; at least one is left to train on.
    """
    validation: set[int] = set()
    test: set[int] = set()
    for of_environment in seeds.values():
        order = sorted(set(of_environment), key=lambda seed: derive_seed(_KEY, seed))
        if len(order) < FEWEST_SEEDS:
            continue
        middle = _share(validation_fraction, len(order), len(order) - 1)
        end = middle + _share(test_fraction, len(order), len(order) - 1 - middle)
        validation.update(order[:middle])
        test.update(order[middle:end])
    return validation, test - validation


def _share(fraction: float, num: int, most: int) -> int:
    return min(max(1, round(fraction * num)), most) if fraction > 0 else 0


def _file(version: Version, name: str) -> str:
    middle = "" if name == DEFAULT_NAME else f".{name}"
    return f"versions/{version.number}.splits{middle}.json"
