"""Tells the outside that a version is blocked: one POST to a webhook, which never fails the run.

Where to: $ESPER_WEBHOOK_BLOCK names a webhook block of the Prefect server that the run is on, else $ESPER_WEBHOOK_URL
is the address itself. Addresses of webhooks are credentials: they come from there alone, and no message repeats more of
one than its host.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from esper.karn.verdict_text import blocked_uses, check_row, levels, sorted_checks
from esper.leyline.errors import EsperError
from esper.leyline.verdict import Level, Verdict

URL_VARIABLE = "ESPER_WEBHOOK_URL"
BLOCK_VARIABLE = "ESPER_WEBHOOK_BLOCK"
TIMEOUT_S = 5.0

Payload = dict[str, Any]


class NotifyError(EsperError):
    """A webhook was not reached, or did not take the message."""


def blocked_payload(verdict: Verdict, page: Path | None) -> Payload:
    """Return what a receiver is sent: dataset, version, verdict by use, the checks that block, and the page."""
    rows = [check_row(check) for check in sorted_checks(verdict) if check.level is Level.BLOCK]
    return {
        "dataset": verdict.dataset,
        "version": verdict.version,
        "verdict": levels(verdict),
        "failed_checks": [
            {
                "check": row.name,
                "environment": row.environment,
                "value": row.value,
                "limits": row.thresholds.replace("\n", ", "),
                "message": row.message,
                "remedy": row.remedy,
            }
            for row in rows
        ],
        "link": None if page is None else page.resolve().as_uri(),
    }


def notify_blocked(verdict: Verdict, page: Path | None, *, under_prefect: bool) -> bool:
    """Send the message if the verdict blocks a use and a webhook is set; return whether it was taken.

    What goes wrong is one line on the error stream: a dead receiver costs the run nothing but its time limit.

    Args:
        verdict: The verdict.
        page: The health page to link to.
        under_prefect: Whether a Prefect server is there, whose blocks can be used.
    """
    if not blocked_uses(verdict):
        return False
    send = _sender(under_prefect)
    if send is None:
        return False
    try:
        send(blocked_payload(verdict, page))
    except NotifyError as error:
        sys.stderr.write(f"warning: {error}\n")
        return False
    return True


def _sender(under_prefect: bool) -> Callable[[Payload], None] | None:
    block, url = os.environ.get(BLOCK_VARIABLE), os.environ.get(URL_VARIABLE)
    if block and under_prefect:
        return lambda payload: _post_with_prefect(payload, block=block)
    if url and under_prefect:
        return lambda payload: _post_with_prefect(payload, url=url)
    if url:
        return lambda payload: _post(payload, url)
    if block:
        return lambda payload: _refuse(
            f"webhook block {block!r} needs Prefect, and this run is without; nobody was told"
        )
    return None


def _refuse(text: str) -> None:
    raise NotifyError(text)


def masked(url: str) -> str:
    """Return an address without what may be secret: user, path and query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not an address)"
    return f"{parts.scheme}://{parts.hostname or '?'}{port}/…"


def _checked(url: str) -> str:
    try:
        good = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
    except ValueError:
        good = False
    if not good:
        raise NotifyError(f"${URL_VARIABLE} is not an http or https address; nobody was told")
    return url


def _post(payload: Payload, url: str) -> None:
    body = json.dumps(payload).encode()
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked
        _checked(url), data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 - as above
            return
    except urllib.error.HTTPError as error:
        reason = f"status {error.code}"
    except (OSError, ValueError) as error:  # URLError is an OSError; a message may repeat the address
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) or type(cause).__name__
    raise NotifyError(f"the webhook at {masked(url)} did not take the message ({reason})")


def _post_with_prefect(payload: Payload, *, block: str | None = None, url: str | None = None) -> None:
    """Send through Prefect's webhook block: the one stored under a name, or one made of an address."""
    import httpx
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    if block is None:
        webhook, place = Webhook(url=SecretStr(_checked(str(url)))), masked(str(url))
    else:
        try:
            webhook = cast("Webhook", Webhook.load(block, _sync=True))  # type: ignore[call-arg]
        except ValueError:
            raise NotifyError(f"Prefect has no webhook block {block!r}; nobody was told") from None
        place = f"{masked(webhook.url.get_secret_value())} (block {block!r})"
    try:
        status = asyncio.run(webhook.call(payload)).status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise NotifyError(f"the webhook at {place} did not take the message ({type(error).__name__})") from None
    if status >= 400:
        raise NotifyError(f"the webhook at {place} did not take the message (status {status})")
