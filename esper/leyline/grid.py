"""What is trained in one go: a grid of recipes, each combination a policy with a name, and the table of the results."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.spec_base import Spec

Algorithm = Literal["bc", "rwbc", "iql", "cql", "imitate"]
Backend = Literal["esper", "d3rlpy"]

POLICY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
"""Names of policies are names of folders too."""

LARGEST_GRID = 1000


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One policy of a grid: a recipe and what differs from it.

    Attributes:
        name: The policy's name.
        algorithm: The learner.
        backend: Whose implementation of it.
        recipe: Name or path of the base recipe; None: the one of the learner's name.
        changes: Values by field, nested as in the recipe.
    """

    name: str
    algorithm: Algorithm
    backend: Backend
    recipe: str | None
    changes: dict[str, Any]


class GridLearner(Spec):
    """A base recipe and the values of some of its fields; every combination of them is a policy.

    Attributes:
        algorithm: The learner.
        backend: Whose implementation of it.
        recipe: Name of the base recipe, or a TOML file; the one of the learner's name unless given.
        name: How the policies' names begin; the learner's name unless given.
        fields: Lists of values by field; a table stands for a field that is a specification itself (`network`).
    """

    algorithm: Algorithm
    backend: Backend = "esper"
    recipe: str | None = None
    name: Annotated[str, Field(pattern=POLICY_NAME)] | None = None
    fields: dict[str, Any] = Field(default_factory=dict)

    @field_validator("fields")
    @classmethod
    def _lists(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for path, values in _leaves(fields):
            if not isinstance(values, list) or not values:
                raise ValueError(f"{'.'.join(path)} = {values!r} is not a list of values, such as [0.5, 0.7]")
        return fields

    def points(self) -> list[GridPoint]:
        """Return the combinations; the last field changes fastest. A name tells the fields with several values."""
        axes = list(_leaves(self.fields))
        lasts = [path[-1] for path, _ in axes]
        labels = [path[-1] if lasts.count(path[-1]) == 1 else ".".join(path) for path, _ in axes]
        base = self.name or default_name(self.algorithm, self.backend)
        found = []
        for chosen in itertools.product(*(values for _, values in axes)):
            changes: dict[str, Any] = {}
            parts = [base]
            for (path, values), label, value in zip(axes, labels, chosen, strict=True):
                _put(changes, path, value)
                if len(values) > 1:
                    parts.append(f"{label}-{_short(value)}")
            found.append(GridPoint("-".join(parts), self.algorithm, self.backend, self.recipe, changes))
        return found


class GridSpec(Spec):
    """Learners with lists of field values. A policy that two learners give must get two names.

    Example of a file:

        name = "iql-width"
        [[learners]]
        algorithm = "iql"
        [learners.fields]
        expectile = [0.5, 0.7, 0.9]
        network.hidden = [64, 128]
    """

    name: str
    learners: Annotated[tuple[GridLearner, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [point.name for point in self.points()]
        if len(names) > LARGEST_GRID:
            raise ValueError(f"{len(names)} combinations; expected {LARGEST_GRID} at most: drop some values")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two policies are called {', '.join(twice)}; give one of the learners another name")
        long = [name for name in names if not re.match(POLICY_NAME, name)]
        if long:
            raise ValueError(f"{long[0]!r} is too long for a policy's name; give the learner a short name")
        return self

    def points(self, algorithm: Algorithm | None = None) -> list[GridPoint]:
        """Return the policies in the order of the file, those of one learner alone where it is given.

        Raises:
            SpecError: The grid has no such learner.
        """
        found = [p for learner in self.learners if algorithm in (None, learner.algorithm) for p in learner.points()]
        if not found:
            known = ", ".join(dict.fromkeys(learner.algorithm for learner in self.learners))
            raise SpecError(f"grid {self.name!r} has no learner {algorithm}\n  it has: {known}")
        return found


class TrainedPolicy(Spec):
    """One row of the table of a training run.

    Attributes:
        metrics: The last measured values; held-out ones begin with `held_out_`.
        wall_s: Time that it took, seconds; 0 where it was there already.
        was_stored: The run's folder held this very policy already.
    """

    policy: LearnedPolicy
    algorithm: str
    backend: Backend
    seed: int
    metrics: dict[str, float]
    wall_s: float
    was_stored: bool

    @property
    def held_out(self) -> tuple[str, float] | None:
        """The held-out measure that says most (the policy's, else the first), with its name; None without any."""
        found = {k.removeprefix("held_out_"): v for k, v in self.metrics.items() if k.startswith("held_out_")}
        found.pop("rows", None)
        name = "policy_loss" if "policy_loss" in found else next((n for n in found if n.endswith("loss")), None)
        return None if name is None else (name, found[name])


class TrainingTable(Spec):
    """What a training run made, in the order of its grid, seeds fastest."""

    run: str
    dataset: str
    folder: str
    rows: tuple[TrainedPolicy, ...]


def default_name(algorithm: Algorithm, backend: Backend) -> str:
    """Return the name of a learner's policy and of its recipe."""
    return algorithm if backend == "esper" else f"{backend}-{algorithm}"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables with some values replaced; neither argument changes."""
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return out


def _leaves(fields: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of everything that is not a table."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _put(tables: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tables = tables.setdefault(key, {})
    tables[path[-1]] = value


def _short(value: Any) -> str:
    """A value as a part of a name: `0.5`, `64x32`, `return`, `true`."""
    if isinstance(value, list):
        return "x".join(_short(item) for item in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
