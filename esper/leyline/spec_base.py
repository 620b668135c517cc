"""The base of every specification: frozen, complete, hashed by its canonical JSON, read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from esper.leyline.errors import SpecError, nearest
from esper.leyline.keys import hex_digest


class Spec(BaseModel):
    """A frozen specification; an unknown key is an error that names the nearest."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @property
    def spec_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON of every field."""
        return self.id_without()

    def id_without(self, *fields: str) -> str:
        """Return the id that leaves some fields out."""
        return hex_digest(self.model_dump(mode="json", exclude=set(fields)), 16)

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "input") -> Self:
        """Return the specification in `data`; `source` names it in errors.

        Raises:
            SpecError: An unknown key, a missing one, or a value of the wrong type or range.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(_explain(cls, error, source)) from None

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Return the specification in a TOML file."""
        return cls.parse(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; SpecError where it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from None


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The known keys beside the one at `location`, as far as the model's types tell."""
    candidates: list[type[BaseModel]] = [model]
    for part in location[:-1]:
        tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == part]
        fields = [c.model_fields[str(part)] for c in candidates if str(part) in c.model_fields]
        if tagged:
            candidates = tagged
        elif fields:
            candidates = _models_in([fields[0].annotation, *fields[0].metadata])
    return list(candidates[0].model_fields) if len(candidates) == 1 else []


def _models_in(annotations: Iterable[Any]) -> list[type[BaseModel]]:
    """Every model class that the annotations mention."""
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models_in(getattr(annotation, "__args__", ()))
    return found


def _explain(model: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    found = error.errors()
    for item in found:
        depth = len(item["loc"])
        if depth and any(len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in found):
            continue  # what is wrong inside has made the whole wrong: "0 items after validation"
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"])
            close = nearest(str(item["loc"][-1]), known)
            hint = f"; did you mean {close!r}?" if close else ""
            listing = f"\n  known keys: {', '.join(sorted(known))}" if known else ""
            lines.append(f"unknown key {where!r}{hint}{listing}")
        elif item["type"] == "missing":
            lines.append(f"key {where!r} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{where}: {item['msg']} (found {item['input']!r})")
    return f"{source}: " + "\n".join(lines)
