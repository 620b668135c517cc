"""The manifest of a sealed version: what it holds, file by file, and who made it."""

from __future__ import annotations

import json
import re

from pydantic import JsonValue, ValidationError

from esper.karn.places import Place
from esper.leyline.errors import IntegrityError, SchemaError, SpecError
from esper.leyline.schema import SCHEMA_VERSION
from esper.leyline.spec_base import Spec

NAME_PATTERN = re.compile(r"^[a-z0-9-]{1,40}$")


class FileEntry(Spec):
    """One Parquet file; `path` is relative to the dataset's folder, environment seeds are the range inside it."""

    table: str
    path: str
    size: int
    sha256: str
    rows: int
    min_env_seed: int
    max_env_seed: int


class VersionManifest(Spec):
    """A sealed version. The digest covers the deterministic columns, not the layout of the files."""

    dataset: str
    number: int
    schema_version: int
    digest: str
    matrix_id: str
    code_commits: tuple[str, ...]
    table_versions: dict[str, int]
    files: tuple[FileEntry, ...]
    counts: dict[str, int]
    provenance: dict[str, JsonValue]
    created_at: str


def check_dataset_name(name: str) -> str:
    """Return the name, or raise SpecError where it is no dataset name."""
    if not NAME_PATTERN.match(name):
        raise SpecError(f"dataset name {name!r} is not allowed\n  expected: 1 to 40 of a-z, 0-9 and '-'")
    return name


def read_manifest(where: Place, name: str) -> VersionManifest:
    """Return the manifest in a file of a dataset.

    Raises:
        StoreError: It cannot be read.
        SchemaError: A newer Esper wrote it.
        IntegrityError: It is damaged.
    """
    shown = where.show(name)
    try:
        data = json.loads(where.read_text(name))
    except ValueError as error:
        raise IntegrityError(f"{shown} is damaged: {error}\n  restore it from a copy, or seal a new version") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SchemaError(
            f"{shown} has schema version {version}\n"
            f"  expected: at most {SCHEMA_VERSION}, which this installation reads\n"
            "  update esper, or use a dataset that this version of it made"
        )
    try:
        return VersionManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where_in = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{shown} is damaged: {where_in}: {first['msg']}\n  restore it from a copy") from None
