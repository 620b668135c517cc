"""No credential reaches Prefect: errors and log lines are masked on their way, and blocks only fill an environment."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from esper.leyline.errors import EsperError, SpecError
from esper.leyline.secrets import mask, mask_error

BLOCK_KINDS = ("secret", "aws-credentials")
_AWS_VARIABLES = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "region_name": "AWS_REGION",
}


@contextlib.contextmanager
def masked_errors() -> Iterator[None]:
    """An error that leaves it says no credential: Prefect stores what it says as the state of a run."""
    try:
        yield
    except Exception as error:
        mask_error(error)
        said = str(error)
        if mask(said) != said:  # one that makes its text from other fields
            raise EsperError(f"{type(error).__name__}: {mask(said)}") from None
        raise


class _Masking(logging.Formatter):
    """Another formatter's lines, masked."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return mask(self._inner.format(record))


def mask_logs() -> None:
    """Mask every line that Prefect's loggers write or send, from now on; doing it again changes nothing."""
    import prefect.logging  # noqa: F401 - sets the handlers up

    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "prefect"]
    for logger in [logging.getLogger(), *map(logging.getLogger, names)]:
        for handler in logger.handlers:
            if not isinstance(handler.formatter, _Masking):
                handler.setFormatter(_Masking(handler.formatter or logging.Formatter()))


def block_environment(name: str) -> dict[str, str]:
    """Return the environment variables that a block of the Prefect server holds; nothing is logged.

    Args:
        name: `NAME` of a Secret block whose value is a JSON object of variables, or `aws-credentials/NAME`.

    Raises:
        SpecError: There is no such block, or it holds something else; the error repeats none of it.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    kind, _, own = name.rpartition("/")
    kind = kind or BLOCK_KINDS[0]
    if kind not in BLOCK_KINDS:
        raise SpecError(
            f"block {name!r} is of no known kind\n  expected: NAME, or KIND/NAME of {', '.join(BLOCK_KINDS)}"
        )
    with get_client(sync_client=True) as client:
        try:
            document = client.read_block_document_by_name(own, kind, include_secrets=True)
        except ObjectNotFound:
            raise SpecError(
                f"Prefect has no {kind} block {own!r}\n  make it in the server's UI, under Blocks"
            ) from None
    return _variables(document.data, kind, name)


def _variables(data: Mapping[str, Any], kind: str, name: str) -> dict[str, str]:
    if kind == "aws-credentials":
        return {variable: str(data[key]) for key, variable in _AWS_VARIABLES.items() if data.get(key)}
    value = data.get("value")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SpecError(
            f"secret block {name!r} holds no variables\n"
            '  expected: a JSON object of texts, as {"AWS_ACCESS_KEY_ID": "...", "AWS_SECRET_ACCESS_KEY": "..."}'
        )
    return {str(key): item for key, item in value.items()}
