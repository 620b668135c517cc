"""Places: folders of files, on this machine or on an object store, as the store of datasets uses them.

Files are written once and never changed, apart from the few small ones that `write_over` and `append` name. Where the
place is remote its files are read through a mirror, a local folder that holds copies of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from esper.leyline.errors import IntegrityError, SpecError, StoreError

HASH_CHUNK = 1 << 20
PARALLEL_FETCHES = 8
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")


class MissingFileError(StoreError):
    """A file that the place should hold is not there."""


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file of a place: its name relative to it, its bytes, and when it was written (Unix time)."""

    name: str
    size: int
    modified_s: float


class Place(Protocol):
    """One folder of files. Names are relative to it, with `/` between their parts."""

    @property
    def url(self) -> str:
        """What Delta Lake opens and another process is told: an absolute path, or s3://bucket/prefix."""

    @property
    def storage_options(self) -> dict[str, str] | None:
        """Options for Delta Lake, from the environment alone; None where the place is local."""

    @property
    def mirror(self) -> Path:
        """The local folder that holds the files: the place itself, or the cache of what was read from it."""

    def child(self, name: str) -> Place:
        """Return the place of a folder in this one."""

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted."""

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files below a folder of this place, relative to the place, sorted."""

    def files(self, folder: str = "") -> list[PlacedFile]:
        """Return the files below a folder of this place, by name; one that vanishes meanwhile is left out."""

    def holds(self, name: str) -> bool:
        """Return whether a file is there."""

    def read_text(self, name: str) -> str:
        """Return a file's text (MissingFileError, StoreError; IntegrityError where it is no UTF-8)."""

    def write_new(self, name: str, text: str) -> bool:
        """Write a file that must not exist yet; return False, and leave it alone, where it does.

        Readers see all of it or nothing, also after a crash; of any number of writers one wins.
        """

    def write_over(self, name: str, text: str) -> None:
        """Write a file, replacing an older one at once."""

    def append(self, name: str, line: str) -> None:
        """Add a line to a file; of several writers none loses what it wrote."""

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Return the local path of a file that never changes, downloaded first where the place is remote.

        Args:
            name: Which file.
            size: Its bytes, where known: a file of another size is an error.
            sha256: Its hash, where known, checked when it is downloaded.

        Raises:
            MissingFileError: It is not there.
            IntegrityError: It has another size or hash.
            StoreError: It cannot be read.
        """

    def fingerprint(self, name: str) -> tuple[int, str]:
        """Return size and SHA-256 of a file as the place itself holds it now (MissingFileError, StoreError)."""

    def refresh(self, name: str, sha256: str) -> None:
        """Drop the mirror's copy of a file where the place is remote and the copy has another hash."""

    def restore(self, name: str, source: Path) -> None:
        """Write a whole file at once from a local one, over whatever is there (StoreError)."""

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""

    def show(self, name: str = "") -> str:
        """Return the address of the place, or of a file in it, for people: never a credential."""


def place(store: str | Path) -> Place:
    """Return the place at `s3://bucket/prefix` or at a folder; nothing is created or asked yet.

    Raises:
        SpecError: A malformed address, another scheme than s3, or one that carries credentials.
        StoreError: An object store, and the environment has no credentials for it.
    """
    text = str(store)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalPlace(Path(store))
    if scheme[1] != "s3":
        raise SpecError(f"a store with {scheme[1]}:// is not known\n  expected: a folder, or s3://bucket/prefix")
    from esper.karn.object_places import open_object_place

    # A Path has made one slash of the two.
    return open_object_place(re.sub(r"^s3:/+", "s3://", text))


def as_place(where: Place | Path | str) -> Place:
    """Return a place as it is, and the place at a folder or an address."""
    return place(where) if isinstance(where, str | Path) else where


def fetch_all(where: Place, wanted: Sequence[tuple[str, int | None, str | None]]) -> list[Path]:
    """Return the local paths of files given as (name, size, sha256), see `Place.fetch`; several at a time if remote."""
    if where.storage_options is None or len(wanted) < 2:
        return [where.fetch(*item) for item in wanted]
    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        return list(pool.map(lambda item: where.fetch(*item), wanted))


def check_name(name: str) -> str:
    """Return the name of a file in a place, or raise IntegrityError where it points out of it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise IntegrityError(f"file name {name!r} leads out of its folder\n  expected: a path below the dataset")
    return name


def stream_sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of what a file still has to give, 64 hex digits."""
    digest = hashlib.sha256()
    while chunk := file.read(HASH_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return stream_sha256(file)


def check_size(shown: str, found: int, expected: int | None) -> None:
    """Raise IntegrityError unless a file has the size expected."""
    if expected is not None and found != expected:
        raise IntegrityError(
            f"{shown} has {found} bytes\n  expected: {expected}; restore it, or generate the dataset again"
        )


def decode(shown: str, data: bytes) -> str:
    """Return UTF-8 text; IntegrityError where it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{shown} is damaged: {error}\n  restore it from a copy") from None


@dataclass(frozen=True)
class LocalPlace:
    """A folder of this machine, or on a disk that several share."""

    mirror: Path

    @property
    def url(self) -> str:  # noqa: D102
        return str(self.mirror.absolute())

    @property
    def storage_options(self) -> None:  # noqa: D102
        return None

    def child(self, name: str) -> LocalPlace:  # noqa: D102
        return LocalPlace(self.mirror / check_name(name))

    def folders(self) -> list[str]:  # noqa: D102
        try:
            return sorted(entry.name for entry in self.mirror.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._cannot("read", "", error) from None

    def names(self, folder: str = "") -> list[str]:  # noqa: D102
        root = self.mirror / folder
        try:
            return sorted(path.relative_to(self.mirror).as_posix() for path in root.rglob("*") if path.is_file())
        except OSError as error:
            raise self._cannot("read", folder, error) from None

    def files(self, folder: str = "") -> list[PlacedFile]:  # noqa: D102
        found = []
        for name in self.names(folder):
            with contextlib.suppress(FileNotFoundError):
                facts = (self.mirror / name).stat()
                found.append(PlacedFile(name, facts.st_size, facts.st_mtime))
        return found

    def holds(self, name: str) -> bool:  # noqa: D102
        return self._path(name).is_file()

    def read_text(self, name: str) -> str:  # noqa: D102
        try:
            return decode(self.show(name), self._path(name).read_bytes())
        except OSError as error:
            raise self._cannot("read", name, error) from None

    def write_new(self, name: str, text: str) -> bool:  # noqa: D102
        temporary = self._write_temporary(name, text)
        try:
            os.link(temporary, self._path(name))
        except FileExistsError:
            return False
        except OSError as error:
            raise self._cannot("write", name, error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def write_over(self, name: str, text: str) -> None:  # noqa: D102
        temporary = self._write_temporary(name, text)
        try:
            temporary.replace(self._path(name))
        except OSError as error:
            raise self._cannot("write", name, error) from None

    def append(self, name: str, line: str) -> None:  # noqa: D102
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # one short write at the end: writers do not mix
                file.write(line.encode() + b"\n")
        except OSError as error:
            raise self._cannot("write", name, error) from None

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:  # noqa: D102
        path = self._path(name)
        try:
            check_size(self.show(name), path.stat().st_size, size)
        except OSError as error:
            raise self._cannot("read", name, error) from None
        return path

    def fingerprint(self, name: str) -> tuple[int, str]:  # noqa: D102
        path = self._path(name)
        try:
            return path.stat().st_size, file_sha256(path)
        except OSError as error:
            raise self._cannot("read", name, error) from None

    def refresh(self, name: str, sha256: str) -> None:
        """Do nothing: the files are the place's own."""

    def restore(self, name: str, source: Path) -> None:  # noqa: D102
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise self._cannot("write", name, error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:  # noqa: D102
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot("remove", name, error) from None

    def show(self, name: str = "") -> str:  # noqa: D102
        return str(self.mirror / name)

    def _path(self, name: str) -> Path:
        return self.mirror / check_name(name)

    def _write_temporary(self, name: str, text: str) -> Path:
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._cannot("write", name, error) from None
        return temporary

    def _cannot(self, what: str, name: str, error: OSError) -> StoreError:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and what == "read":
            return MissingFileError(f"cannot read {self.show(name)}: {error.strerror}")
        return StoreError(f"cannot {what} {self.show(name)}: {error.strerror}{_advice(what, error)}")


def _advice(what: str, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "\n  free some space and run it again; nothing that was stored is lost"
    return "\n  choose another folder with --store" if what == "write" else ""
