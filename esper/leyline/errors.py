"""One tree of errors. A message says what and which value, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EsperError(Exception):
    """Base of every error that Esper raises on purpose; `exit_code` is the command's exit status."""

    exit_code = 1


class SpecError(EsperError):
    """A specification, an option or an argument is wrong."""

    exit_code = 2


class UnknownNameError(SpecError):
    """A name is not among the known ones."""


class DataError(EsperError):
    """The data of a task are missing, unreadable or wrong."""

    exit_code = 2


class QueryError(EsperError):
    """A SQL statement was refused or failed."""

    exit_code = 2


class HealthError(EsperError):
    """A dataset is blocked, or was never checked, for the use asked for."""

    exit_code = 3


class IntegrityError(EsperError):
    """Stored data is not what its manifest says."""

    exit_code = 4


class SchemaError(IntegrityError):
    """Stored data has a schema that this version cannot read."""


class StoreError(EsperError):
    """The store cannot be read or written (missing, no permission, disk full)."""


class CheckpointError(EsperError):
    """A checkpoint is missing, damaged or made for another network."""


class LifecycleError(EsperError):
    """A seed was asked to make a transition that the lifecycle does not have."""


class MaskError(EsperError):
    """An action mask is inconsistent, or an action is not in it."""


class ControlError(EsperError):
    """A positive or negative control of a run failed: the engine or the task is wrong."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for an unknown name, with the nearest known one and the whole list when it is short."""
    names = sorted(known)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    listing = ", ".join(names) if len(names) <= 40 else f"{len(names)} names, from {names[0]} to {names[-1]}"
    return UnknownNameError(f"unknown {kind} {name!r}{hint}\n  known: {listing or 'none'}")
