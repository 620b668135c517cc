"""The manifest of a sealed version: what it holds, file by file, and who made it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from pathlib import Path

from pydantic import JsonValue, ValidationError

from esper.leyline.errors import IntegrityError, SchemaError, SpecError, StoreError
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


def read_manifest(path: Path) -> VersionManifest:
    """Return the manifest in a file.

    Raises:
        StoreError: It cannot be read.
        SchemaError: A newer Esper wrote it.
        IntegrityError: It is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}\n  restore it from a copy, or seal a new version") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema version {version}\n"
            f"  expected: at most {SCHEMA_VERSION}, which this installation reads\n"
            "  update esper, or use a dataset that this version of it made"
        )
    try:
        return VersionManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path} is damaged: {where}: {first['msg']}\n  restore it from a copy") from None


def write_new(path: Path, text: str) -> bool:
    """Write a file that must not exist yet; return False, and leave it alone, where it does.

    Readers see all of it or nothing, also after a crash.
    """
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def write_over(path: Path, text: str) -> None:
    """Write a file, replacing an older one at once."""
    temporary = _write_temporary(path, text)
    try:
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def _write_temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}\n  choose another folder with --store") from None
    return temporary
