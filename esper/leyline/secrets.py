"""Credentials never leave the process: what looks like one, or is one in the environment, is masked in every text.

Applied to errors, events, logs, artifacts and cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from pydantic import JsonValue

MASK = "***"
MIN_SECRET_CHARACTERS = 6
"""Shorter values of the environment are ordinary words (`true`, `us`) far more often than secrets."""

_WORDS = r"SECRETS?|TOKENS?|KEYS?|API_?KEYS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH_STRING|WEBHOOK_URL"
_SECRET_VARIABLE = re.compile(rf"(?:^|_)(?:{_WORDS})(?:_|$)", re.IGNORECASE)

_USER_IN_URL = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"<>]+@")
_QUERY = re.compile(
    r"([?&](?:[^=&\s'\"]*(?:token|secret|key|password|signature|credential|auth)[^=&\s'\"]*)=)[^&\s'\"<>#]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"(\b[a-z0-9_.-]*(?:secret|token|password|passwd|passphrase|api_?key|access_?key|private_?key)[a-z0-9_.-]*['\"]?"
    r"\s*[=:]\s*['\"]?)(?!\s)([^\s'\",;&<>]{4,})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_KNOWN_SHAPES = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}"
    r"|pn[uba]_[A-Za-z0-9]{20,}|xox[abp]-[A-Za-z0-9-]{10,})\b"
)


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable's name says that its value is a credential."""
    return _SECRET_VARIABLE.search(name) is not None


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the credentials among the values of an environment (this process's), the longest first."""
    found = {
        value
        for name, value in (os.environ if environment is None else environment).items()
        if len(value) >= MIN_SECRET_CHARACTERS and is_secret_variable(name)
    }
    return sorted(found, key=len, reverse=True)


def mask(text: str) -> str:
    """Return a text without credentials, each replaced by `***`.

    These are values of environment variables whose names say so (SECRET, TOKEN, KEY, PASSWORD, ...; six characters
    or more), users and passwords in addresses, query values named like one, `name=value` of such names, bearer tokens,
    and keys of well-known shapes (AWS, GitHub, Hugging Face, Prefect, Slack).
    """
    for value in secret_values():
        text = text.replace(value, MASK)
    text = _USER_IN_URL.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _KNOWN_SHAPES.sub(MASK, text)
    return _ASSIGNED.sub(rf"\1{MASK}", text)


def mask_json(value: JsonValue) -> JsonValue:
    """Return a JSON value with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, list):
        return [mask_json(item) for item in value]
    if isinstance(value, dict):
        return {key: mask_json(item) for key, item in value.items()}
    return value


def mask_error(error: BaseException) -> None:
    """Mask the message and the notes of an error in place; what it is stays as it is."""
    error.args = tuple(mask(item) if isinstance(item, str) else item for item in error.args)
    notes = getattr(error, "__notes__", None)
    if notes:
        notes[:] = [mask(note) for note in notes]
