"""What goes wrong in a store, in one line for people: from Delta Lake, obstore and the operating system."""

from __future__ import annotations

import re

from esper.leyline.errors import StoreError
from esper.leyline.secrets import mask

MAX_REASON = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_KNOWN = (
    ("NoSuchBucket", "the bucket does not exist", "create it, or name another with --store"),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|AccessDenied|401 Unauth|403 Forbidden",
        "the object store refuses the credentials",
        "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and what they may do with the bucket",
    ),
    (
        "error sending request|error trying to connect|dns error|Connection refused|timed out|Connection reset",
        "the object store does not answer",
        "check AWS_ENDPOINT_URL, AWS_REGION and the network",
    ),
    (
        "os error 28|No space left on device|Disk quota exceeded",
        "no space left on the disk",
        "free some space and run it again; nothing that was stored is lost",
    ),
    (
        "os error 30|Read-only file system",
        "the file system is read-only",
        "make it writable, or choose another store with --store",
    ),
    (
        "os error 13|Permission denied",
        "no permission",
        "check that the folder is writable, or choose another with --store",
    ),
)


def explained(error: BaseException | str) -> str:
    """Return the reason that an error gives, on one line, without colours, arrows and credentials."""
    lines = _COLOURS.sub("", str(error)).split("Debug source")[0].replace("↳", "").splitlines()
    text = ": ".join(line.strip() for line in lines if line.strip())
    return mask(text[:MAX_REASON]) or type(error).__name__


def known_cause(error: BaseException | str) -> tuple[str, str] | None:
    """Return (what happened, what to do) for a cause that is known, else None."""
    text = str(error)
    return next(((what, advice) for pattern, what, advice in _KNOWN if re.search(pattern, text)), None)


def store_error(shown: str, error: BaseException | str, advice: str) -> StoreError:
    """Return the error for a store at `shown`; `advice` is what to do about a cause that is not known."""
    cause = known_cause(error)
    what, todo = cause or (explained(error), advice)
    return StoreError(f"cannot use the store at {shown}: {what}\n  {todo}")


def object_store_error(shown: str, error: BaseException) -> StoreError:
    """Return the error for a place on an object store."""
    return store_error(shown, error, "check the bucket, AWS_ENDPOINT_URL and the credentials in the environment")
