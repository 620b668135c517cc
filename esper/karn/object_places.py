"""Places on an object store: s3://bucket/prefix, with the credentials of the environment."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from esper.karn.places import MissingFileError, PlacedFile, check_name, check_size, decode, file_sha256
from esper.karn.store_errors import explained, object_store_error
from esper.leyline.errors import IntegrityError, SpecError, StoreError
from esper.leyline.folders import cache_folder

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

CONNECT_TIMEOUT_S = 3
REQUEST_TIMEOUT_S = 60
MAX_RETRIES = 5
RETRY_TIMEOUT_S = 15
APPEND_TRIES = 50
DOWNLOAD_CHUNK = 1 << 22
DEFAULT_REGION = "us-east-1"
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHER_VARIABLES = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")

_ADDRESS = re.compile(r"^s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9._=+-]+)*)/?$")


def open_object_place(url: str) -> ObjectPlace:
    """Return the place at `s3://bucket/prefix`; see `places.place` for the errors."""
    if "@" in url:
        raise SpecError(
            "the address of the store carries a user or a password\n"
            "  expected: s3://bucket/prefix, and the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    parts = _ADDRESS.match(url)
    if parts is None or any(part in (".", "..") for part in url.split("/")):
        raise SpecError(
            f"{url!r} is no address of a store\n"
            "  expected: s3://bucket/prefix, the parts of the prefix of letters, digits and . _ = + -"
        )
    storage_options_of(os.environ, url)
    clean = url.rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    key = hashlib.sha256(f"{endpoint} {clean}".encode()).hexdigest()[:12]
    return ObjectPlace(parts[1], parts[2].strip("/"), cache_folder() / "stores" / f"{parts[1]}-{key}")


def storage_options_of(environment: Mapping[str, str], shown: str) -> dict[str, str]:
    """Return what Delta Lake and obstore need to reach the object store.

    Raises:
        StoreError: No credentials, or an endpoint without encryption that was not allowed.
        SpecError: The endpoint's address carries credentials.
    """
    missing = [name for name in SECRET_VARIABLES if not environment.get(name)]
    if missing:
        raise StoreError(
            f"no credentials for {shown}: {' and '.join(missing)} not set\n"
            "  expected: them in the environment, with AWS_REGION and, for another service than AWS, AWS_ENDPOINT_URL"
        )
    endpoint = environment.get("AWS_ENDPOINT_URL", "")
    if "@" in endpoint:
        raise SpecError("AWS_ENDPOINT_URL carries a user or a password\n  expected: https://host:port")
    allowed = environment.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    if endpoint.startswith("http:") and not allowed:
        raise StoreError(
            f"the endpoint {endpoint} is not encrypted\n"
            "  expected: https://, or AWS_ALLOW_HTTP=true where the network is your own"
        )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    options = {name: environment[name] for name in (*SECRET_VARIABLES, *OTHER_VARIABLES) if environment.get(name)}
    return options | {
        "AWS_REGION": region,
        "AWS_ALLOW_HTTP": "true" if allowed else "false",
        "AWS_CONDITIONAL_PUT": "etag",
        "AWS_S3_ALLOW_UNSAFE_RENAME": "false",
        "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
        "timeout": f"{REQUEST_TIMEOUT_S}s",
        "max_retries": str(MAX_RETRIES),
        "retry_timeout": f"{RETRY_TIMEOUT_S}s",
    }


@lru_cache(maxsize=8)
def _client(bucket: str, options: tuple[tuple[str, str], ...]) -> S3Store:
    from obstore.store import S3Store

    settings = dict(options)
    config: S3Config = {
        "access_key_id": settings["AWS_ACCESS_KEY_ID"],
        "secret_access_key": settings["AWS_SECRET_ACCESS_KEY"],
        "region": settings["AWS_REGION"],
        "conditional_put": "etag",
    }
    if "AWS_SESSION_TOKEN" in settings:
        config["session_token"] = settings["AWS_SESSION_TOKEN"]
    if "AWS_ENDPOINT_URL" in settings:
        config["endpoint"] = settings["AWS_ENDPOINT_URL"]
    return S3Store(
        bucket,
        config=config,
        client_options={
            "allow_http": settings["AWS_ALLOW_HTTP"] == "true",
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
        },
        retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)},
    )


@dataclass(frozen=True)
class ObjectPlace:
    """The objects of a bucket below a prefix; it holds no credential, so it may be pickled and shown."""

    bucket: str
    prefix: str
    mirror: Path

    @property
    def url(self) -> str:  # noqa: D102
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def storage_options(self) -> dict[str, str]:  # noqa: D102
        return storage_options_of(os.environ, self.url)

    def child(self, name: str) -> ObjectPlace:  # noqa: D102
        return ObjectPlace(self.bucket, self._key(name), self.mirror / name)

    def folders(self) -> list[str]:  # noqa: D102
        import obstore

        with self._errors():
            found = obstore.list_with_delimiter(self._store, self.prefix or None)
        return sorted(path.rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def names(self, folder: str = "") -> list[str]:  # noqa: D102
        return [file.name for file in self.files(folder)]

    def files(self, folder: str = "") -> list[PlacedFile]:  # noqa: D102
        import obstore

        start = len(self.prefix) + 1 if self.prefix else 0
        key = "/".join(part for part in (self.prefix, folder) if part)
        with self._errors(folder):
            pages = obstore.list(self._store, key or None, chunk_size=1000)
            found = [
                PlacedFile(item["path"][start:], item["size"], item["last_modified"].timestamp())
                for page in pages
                for item in page
            ]
        return sorted(found, key=lambda file: file.name)

    def holds(self, name: str) -> bool:  # noqa: D102
        import obstore

        try:
            with self._errors(name):
                obstore.head(self._store, self._key(name))
        except MissingFileError:
            return False
        return True

    def read_text(self, name: str) -> str:  # noqa: D102
        return decode(self.show(name), self._read(name)[0])

    def write_new(self, name: str, text: str) -> bool:  # noqa: D102
        import obstore

        with self._errors(name):
            try:
                obstore.put(self._store, self._key(name), text.encode(), mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def write_over(self, name: str, text: str) -> None:  # noqa: D102
        import obstore

        with self._errors(name):
            obstore.put(self._store, self._key(name), text.encode())

    def append(self, name: str, line: str) -> None:  # noqa: D102
        import obstore

        for attempt in range(APPEND_TRIES):
            try:
                data, etag = self._read(name)
            except MissingFileError:
                if self.write_new(name, line + "\n"):
                    return
                continue
            with self._errors(name), contextlib.suppress(obstore.exceptions.PreconditionError):
                obstore.put(self._store, self._key(name), data + line.encode() + b"\n", mode={"e_tag": etag})
                return
            time.sleep(0.02 * (attempt + 1))
        raise StoreError(f"cannot write {self.show(name)}: others were faster {APPEND_TRIES} times; run it again")

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:  # noqa: D102
        import obstore

        key, target = self._key(name), self.mirror / name
        with contextlib.suppress(OSError):
            if target.stat().st_size == size or (size is None and target.is_file()):
                return target
        with self._errors(name):
            result = obstore.get(self._store, key)
            check_size(self.show(name), result.meta["size"], size)
            found = self._download(result.stream(min_chunk_size=DOWNLOAD_CHUNK), target, sha256)
        if sha256 is not None and found != sha256:
            raise IntegrityError(
                f"{self.show(name)} has SHA-256 {found[:16]}…\n"
                f"  expected: {sha256[:16]}… (sealed); restore it, or generate the dataset again"
            )
        return target

    def _download(self, chunks: Iterator[bytes], target: Path, sha256: str | None) -> str:
        """Write to the mirror, unless the bytes have another hash than `sha256`; return the hash."""
        digest = hashlib.sha256()
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if sha256 in (None, digest.hexdigest()):
                temporary.replace(target)
        except OSError as error:
            raise StoreError(
                f"cannot write {target}, the local copy of {self.show()}: {explained(error)}\n"
                "  free some space, or name another folder in $ESPER_CACHE"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def fingerprint(self, name: str) -> tuple[int, str]:  # noqa: D102
        import obstore

        digest, size = hashlib.sha256(), 0
        with self._errors(name):
            for chunk in obstore.get(self._store, self._key(name)).stream(min_chunk_size=DOWNLOAD_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def refresh(self, name: str, sha256: str) -> None:  # noqa: D102
        copy = self.mirror / check_name(name)
        with contextlib.suppress(OSError):
            if file_sha256(copy) != sha256:
                copy.unlink(missing_ok=True)

    def restore(self, name: str, source: Path) -> None:  # noqa: D102
        import obstore

        with self._errors(name):
            obstore.put(self._store, self._key(name), source)

    def remove(self, name: str) -> None:  # noqa: D102
        import obstore

        with self._errors(name), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, self._key(name))
        with contextlib.suppress(OSError):
            (self.mirror / name).unlink(missing_ok=True)

    def show(self, name: str = "") -> str:  # noqa: D102
        return f"{self.url}/{name}" if name else self.url

    @property
    def _store(self) -> S3Store:
        return _client(self.bucket, tuple(sorted(self.storage_options.items())))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{check_name(name)}" if self.prefix else check_name(name)

    def _read(self, name: str) -> tuple[bytes, str | None]:
        """A small object's bytes and entity tag."""
        import obstore

        with self._errors(name):
            result = obstore.get(self._store, self._key(name))
            return bytes(result.bytes()), result.meta["e_tag"]

    @contextlib.contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        import obstore

        try:
            yield
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise MissingFileError(f"cannot read {self.show(name)}: no such object") from None
            raise object_store_error(self.show(name), error) from None
