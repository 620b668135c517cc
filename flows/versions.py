"""What a sealed version says about its environments and rewards."""

from __future__ import annotations

from typing import Any, TypeVar

from esper.karn.kinds import refuse_skeleton
from esper.karn.versions import Version
from esper.leyline.errors import SpecError
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec

__all__ = ["environments_of", "refuse_skeleton", "rewards_of"]

AnySpec = TypeVar("AnySpec", bound=Spec)


def rewards_of(version: Version) -> dict[str, RewardSpec]:
    """Return the reward of each environment, as the version's provenance has it."""
    return _specs(version, "rewards", RewardSpec)


def environments_of(version: Version) -> dict[str, EnvironmentSpec]:
    """Return the environments by name, as the version's provenance has them."""
    return _specs(version, "environments", EnvironmentSpec)


def _specs(version: Version, key: str, spec: type[AnySpec]) -> dict[str, AnySpec]:
    found: Any = version.manifest.provenance.get(key)
    if not isinstance(found, dict) or not found:
        raise SpecError(
            f"{version.ref} does not say which {key} it was made with\n"
            "  expected: a version that `esper datagen` sealed; run it again for this dataset"
        )
    return {name: spec.parse(data, f"{version.location}: {key}.{name}") for name, data in found.items()}
