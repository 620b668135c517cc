"""What a flow run shows on its page in Prefect: tables and the places of files, without credentials."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from esper.karn.comparison_page import comparison_page
from esper.leyline.comparison import Evaluation
from esper.leyline.secrets import mask

_LOG = logging.getLogger(__name__)
_NOT_IN_KEYS = re.compile(r"[^a-z0-9-]+")


def artifact_key(*parts: object) -> str:
    """Return a key of Prefect's grammar (a-z, 0-9 and '-') from names."""
    return _NOT_IN_KEYS.sub("-", "-".join(str(part).lower() for part in parts)).strip("-")


def publish(key: str, markdown: str, description: str) -> None:
    """Show a text on the page of the current flow run; a server that does not answer costs a line in the log."""
    import httpx
    from prefect.artifacts import create_markdown_artifact
    from prefect.exceptions import PrefectException

    try:
        create_markdown_artifact(markdown=mask(markdown), key=key, description=mask(description))
    except (PrefectException, httpx.HTTPError) as error:
        _LOG.warning("%s is not shown by Prefect: %s", description, mask(str(error)))


def publish_comparison(evaluation: Evaluation, page: Path) -> None:
    """Show an evaluation's comparison table."""
    text = f"{comparison_page(evaluation)}\n\n{places({'page': page})}"
    key = artifact_key("comparison", evaluation.dataset, evaluation.version)
    publish(key, text, f"Comparison on {evaluation.dataset}@{evaluation.version}")


def publish_places(name: str, files: Mapping[str, Path]) -> None:
    """Show where files lie; as text, because a browser opens no file from a page of a server."""
    publish(artifact_key("files", name), f"# Files of {name}\n\n{places(files)}", f"Files of {name}")


def places(files: Mapping[str, Path]) -> str:
    """Return a Markdown list of files by what they are."""
    return "\n".join(f"- {what}: `{path.resolve()}`" for what, path in files.items())
