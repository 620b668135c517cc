"""Families: environments that share everything but the host, whose bottlenecks lie in different places."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec

Positive = Annotated[int, Field(gt=0)]


class Member(Spec):
    """One host of a family: what it has of its own. Its environment is called `FAMILY-NAME`."""

    name: str
    kernels: tuple[int, ...]
    pools: tuple[int, ...]
    narrowed: tuple[int, ...] = ()
    frozen: tuple[bool, ...] = ()


class DrawnMembers(Spec):
    """Hosts drawn without repetition from all combinations of kernels, pools and at most one impaired block.

    Attributes:
        count: Hosts drawn; a smaller family is the beginning of a larger one.
        kernels: Kernel sizes per block.
        pools: Pooling per block.
        narrowed_to: Channels left in a narrowed block.
    """

    count: Positive
    kernels: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1)]
    pools: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1)]
    narrowed_to: Positive = 1

    def members(self, family: str) -> tuple[Member, ...]:
        """Return the hosts in a keyed order; SpecError where there are fewer than `count`."""
        variants = [
            {"kernels": kernels, "pools": pools, **impairment}
            for kernels, pools in product(self.kernels, self.pools)
            for impairment in self._impairments(len(kernels))
        ]
        if self.count > len(variants):
            raise SpecError(f"family {family!r}: {self.count} hosts drawn from {len(variants)} combinations")
        order = numpy_generator("family", family).permutation(len(variants))[: self.count]
        return tuple(
            Member.parse({"name": f"{index:03}", **variants[variant]}, f"family {family!r}")
            for index, variant in enumerate(order)
        )

    def _impairments(self, num_blocks: int) -> list[dict[str, Any]]:
        """Nothing, each block narrowed, each block frozen."""
        blocks = range(num_blocks)
        narrowed: list[dict[str, Any]] = [
            {"narrowed": tuple(self.narrowed_to * (b == hit) for b in blocks)} for hit in blocks
        ]
        frozen: list[dict[str, Any]] = [{"frozen": tuple(b == hit for b in blocks)} for hit in blocks]
        return [{}, *narrowed, *frozen]


class FamilySpec(Spec):
    """Environments of one task whose hosts differ.

    Attributes:
        environment: The fields of an environment that all members share, `name` left out; the table of its host lacks
            what the members bring.
        members: The hosts, one by one.
        drawn: Or a rule that draws them.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    environment: dict[str, Any]
    members: tuple[Member, ...] = ()
    drawn: DrawnMembers | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.members) == (self.drawn is not None):
            raise ValueError("expected [[members]] or a [drawn] table, one of the two")
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"two members have one name: {names}")
        return self

    def environments(self) -> tuple[EnvironmentSpec, ...]:
        """Return the environments of all members, in order; SpecError where one makes no sense."""
        members = self.members if self.drawn is None else self.drawn.members(self.name)
        return tuple(self._environment(member) for member in members)

    def _environment(self, member: Member) -> EnvironmentSpec:
        name = f"{self.name}-{member.name}"
        host = {**self.environment.get("host", {}), **member.model_dump(exclude={"name"})}
        return EnvironmentSpec.parse({**self.environment, "name": name, "host": host}, f"environment {name!r}")
