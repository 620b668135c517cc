"""Whose Prefect state is whose: one server at a time keeps its state in a store, and others can find it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from esper.leyline.errors import EsperError
from esper.leyline.spec_base import Spec

HOME = ".prefect"
LOCK, HOLDER = "server.lock", "server.json"


class ServerError(EsperError):
    """Prefect's server did not start, or is not the one that was expected."""


class Holder(Spec):
    """The process whose server keeps its state in a home.

    Attributes:
        kind: `serve` shares its server with every command on the store, `command` keeps it to itself.
        pid: Of the process that started the server.
        url: Address of the server's API.
    """

    kind: Literal["serve", "command"]
    pid: int
    url: str


def make_home(home: Path) -> Path:
    """Make a home where it is missing; return its absolute path."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(f"cannot make {home} for Prefect's state: {error.strerror}") from None
    return home.resolve()


@contextlib.contextmanager
def held(home: Path) -> Iterator[bool]:
    """Hold a home for this process, and tell whether that was possible; it is let go however the process ends."""
    with (make_home(home) / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            (home / HOLDER).unlink(missing_ok=True)


def say_who_holds(home: Path, kind: Literal["serve", "command"], url: str) -> None:
    """Write down whose server has its state in a home that this process holds."""
    part = home / f"{HOLDER}.part"
    part.write_text(Holder(kind=kind, pid=os.getpid(), url=url).model_dump_json(), encoding="utf-8")
    part.replace(home / HOLDER)


def holder_of(home: Path) -> Holder | None:
    """Return who holds a home, None where nobody does, or has not said so yet."""
    if not (home / LOCK).is_file():
        return None
    with (home / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            return None
    try:
        return Holder.model_validate(json.loads((home / HOLDER).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def healthy(url: str) -> bool:
    """Whether a server answers at an API address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:  # noqa: S310 - an address of Prefect's API
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def serve_address(home: Path) -> str | None:
    """Return the address of the running `esper serve` whose state lies in a home, None without one."""
    holder = holder_of(home)
    if holder is None or holder.kind != "serve" or not healthy(holder.url):
        return None
    return holder.url
