"""One sealed version as one tar file, and back into any store with every byte checked first.

The first member, `archive.json`, names all others with size and SHA-256: the manifest, the verdict, the splits, and the
version's files. Nothing else may be in it. A name that ends in `.zst` is compressed with zstd.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from esper.karn.exchange import Report, silent, whole_or_nothing
from esper.karn.exchange_adopt import adopt
from esper.karn.manifest import check_dataset_name, read_manifest
from esper.karn.places import LocalPlace, check_name
from esper.karn.tables import PARTITION_COLUMN
from esper.karn.versions import Version, manifest_name, verdict_name
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.schema import SCHEMAS
from esper.leyline.spec_base import Spec

if TYPE_CHECKING:
    from esper.karn.store import Store

INDEX = "archive.json"
FORMAT = 1
MAX_INDEX_BYTES = 64 << 20
CHUNK = 1 << 20
_PART = re.compile(rf"^{PARTITION_COLUMN}=[^/]+/[^/]+\.parquet$")
_SPLITS = re.compile(r"^versions/(\d+)\.splits(\.[a-z0-9-]{1,40})?\.json$")


class ArchiveFile(Spec):
    """One file of an archive; `path` is relative to the dataset."""

    path: str
    size: int
    sha256: str


class ArchiveIndex(Spec):
    """What an archive holds."""

    format: int
    dataset: str
    number: int
    digest: str
    files: tuple[ArchiveFile, ...]


def export_archive(version: Version, target: Path, *, report: Report = silent) -> Path:
    """Write a version as one file and return its path.

    Args:
        version: The version.
        target: A path that ends in `.tar` or `.tar.zst`, or a folder, which gets NAME-n.tar.
        report: Told the bytes that are written.

    Raises:
        SpecError: The file is there already.
        IntegrityError: A file of the version is not what its manifest says.
        StoreError: The archive cannot be written.
    """
    path = target if target.name.endswith((".tar", ".tar.zst")) else target / f"{version.name}-{version.number}.tar"
    entries = {entry.path: entry for entry in version.manifest.files}
    texts = {name: version.place.read_text(name).encode() for name in _beside(version)}
    listed = [ArchiveFile(path=name, size=len(t), sha256=hashlib.sha256(t).hexdigest()) for name, t in texts.items()]
    listed += [ArchiveFile(path=e.path, size=e.size, sha256=e.sha256) for e in entries.values()]
    index = ArchiveIndex(
        format=FORMAT,
        dataset=version.name,
        number=version.number,
        digest=version.manifest.digest,
        files=tuple(listed),
    )
    with whole_or_nothing(path) as temporary, _tar(temporary, "w", zstd=path.suffix == ".zst") as tar:
        _add(tar, INDEX, json.dumps(index.model_dump(mode="json"), indent=1).encode())
        for name, text in texts.items():
            _add(tar, name, text)
        for entry in entries.values():
            _add_file(tar, version, entry.path, entry.size, entry.sha256)
            report(entry.size)
    return path


def _beside(version: Version) -> list[str]:
    """The manifest, the verdict and the splits of a version, relative to the dataset."""
    there = version.place.names("versions")
    splits = [name for name in there if (match := _SPLITS.match(name)) and int(match[1]) == version.number]
    verdict = [name for name in there if name == verdict_name(version.number)]
    return [manifest_name(version.number), *verdict, *splits]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _add_file(tar: tarfile.TarFile, version: Version, name: str, size: int, sha256: str) -> None:
    """Add a file of the version; what goes into the archive is hashed on the way."""
    path = version.place.fetch(name, size, sha256)
    member = tarfile.TarInfo(name)
    member.size = size
    with path.open("rb") as file:
        hashing = _Hashing(file)
        tar.addfile(member, hashing)
    if hashing.hexdigest() != sha256:
        raise IntegrityError(
            f"{version.ref}: {path} has another hash than was sealed\n"
            f"  `esper dataset verify {version.ref}` lists every problem"
        )


class _Hashing:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _tar(path: Path, mode: Literal["r", "w"], *, zstd: bool) -> Iterator[tarfile.TarFile]:
    stream: Any
    if zstd:
        stream = (pa.output_stream if mode == "w" else pa.input_stream)(str(path), compression="zstd")
    else:
        stream = path.open(f"{mode}b")
    with stream, tarfile.open(fileobj=stream, mode="w|" if mode == "w" else "r|") as tar:
        yield tar


def import_archive(store: Store, archive: Path, *, name: str | None = None, report: Report = silent) -> Version:
    """Put the version in an archive into a store and return it.

    Everything is unpacked beside and checked, each file's hash and the digest of all rows, before the store is touched.
    An equal version that is there already is returned; one of a dataset that has grown since gets the next number.

    Args:
        store: Where to.
        archive: What `export_archive` wrote.
        name: Another name for the dataset.
        report: Told the bytes that are checked.

    Raises:
        IntegrityError: The archive is damaged, or holds what an archive does not hold.
        SpecError: The dataset exists and holds other rows.
        StoreError: The archive cannot be read, or the store not be written.
    """
    check_dataset_name(name or "x")
    try:
        with tempfile.TemporaryDirectory(prefix="esper-import-") as folder:
            index = _unpack(archive, Path(folder), report)
            version = _checked(archive, Path(folder), index)
            beside = [file.path for file in index.files if file.path.startswith("versions/")]
            return adopt(store, version, beside, name or check_dataset_name(index.dataset))
    except OSError as error:
        raise StoreError(
            f"cannot import {archive}: {error.strerror or error}\n"
            "  it is unpacked where temporary files go: $TMPDIR can name a folder with more space"
        ) from None


def _checked(archive: Path, folder: Path, index: ArchiveIndex) -> Version:
    """The version that was unpacked: it is the one that the index names, whole, and its rows have its digest."""
    place = LocalPlace(folder)
    if not place.holds(manifest_name(index.number)):
        raise _damaged(archive, f"it has no {manifest_name(index.number)}")
    manifest = read_manifest(place, manifest_name(index.number))
    named = (manifest.dataset, manifest.number, manifest.digest)
    if named != (index.dataset, index.number, index.digest):
        raise _damaged(archive, f"its index names {index.dataset}@{index.number}, its manifest {named[0]}@{named[1]}")
    for entry in manifest.files:
        if entry.table not in SCHEMAS or not _PART.match(entry.path.removeprefix(f"{entry.table}/")):
            raise _damaged(archive, f"{entry.path!r} is no place for a file of {entry.table!r}")
    allowed = {manifest_name(index.number), verdict_name(index.number), *(entry.path for entry in manifest.files)}
    for file in index.files:
        splits = _SPLITS.match(file.path)
        if file.path not in allowed and not (splits and int(splits[1]) == index.number):
            raise _damaged(archive, f"it holds {file.path!r}, which is no part of {index.dataset}@{index.number}")
    version = Version(place, manifest)
    version.verdict()
    problems = version.verify()
    if problems:
        raise _damaged(archive, str(problems[0]))
    return version


def _unpack(archive: Path, folder: Path, report: Report) -> ArchiveIndex:
    """Write the files that the index names into a folder; anything else in the archive is an error."""
    try:
        with archive.open("rb") as file:
            zstd = file.read(4) == b"\x28\xb5\x2f\xfd"
        with _tar(archive, "r", zstd=zstd) as tar:
            members = iter(tar)
            index = _read_index(archive, tar, next(members, None))
            expected = {file.path: file for file in index.files}
            if len(expected) != len(index.files):
                raise _damaged(archive, "its index names a file twice")
            for member in members:
                _unpack_file(archive, folder, tar, member, expected.pop(member.name, None))
                report(member.size)
    except (tarfile.TarError, EOFError, pa.ArrowInvalid) as error:
        raise _damaged(archive, str(error) or "it ends early") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(archive, str(error)) from None  # Arrow's word for what is not zstd
    if expected:
        raise _damaged(archive, f"{len(expected)} files are missing, the first is {min(expected)!r}")
    return index


def _read_index(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> ArchiveIndex:
    file = tar.extractfile(member) if member is not None and member.isreg() and member.name == INDEX else None
    if member is None or file is None or member.size > MAX_INDEX_BYTES:
        raise _damaged(
            archive, f"its first member is not {INDEX}: `esper dataset export --as archive` did not write it"
        )
    try:
        index = ArchiveIndex.model_validate_json(file.read())
    except ValidationError as error:
        raise _damaged(archive, f"{INDEX}: {error.errors()[0]['msg']}") from None
    if index.format != FORMAT:
        raise SpecError(f"{archive} has archive format {index.format}\n  expected: {FORMAT}; update esper")
    for entry in index.files:
        check_name(entry.path)
    return index


def _unpack_file(
    archive: Path, folder: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, expected: ArchiveFile | None
) -> None:
    if expected is None:
        raise _damaged(archive, f"it holds {member.name!r}, which its index does not name (or names once)")
    if not member.isreg():
        raise _damaged(archive, f"{member.name!r} is no plain file but a link, a folder or a device")
    if member.size != expected.size:
        raise _damaged(archive, f"{member.name!r} has {member.size} bytes, the index says {expected.size}")
    path = folder / check_name(expected.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        for chunk in _chunks(tar, member):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != expected.sha256:
        raise _damaged(archive, f"{member.name!r} has another hash than the index says")


def _chunks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file = tar.extractfile(member)
    while file is not None and (chunk := file.read(CHUNK)):
        yield chunk


def _damaged(archive: Path, reason: str) -> IntegrityError:
    return IntegrityError(f"{archive} is not imported: {reason}\n  nothing was written; export the version again")
