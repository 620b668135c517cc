"""The table of progress as an artifact of the Prefect flow run: `datagen-NAME`, one that is kept up to date."""

from __future__ import annotations

import json
import logging
from typing import cast
from uuid import UUID

import httpx
import pyarrow as pa
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from esper.karn.progress_table import progress_line

_LOG = logging.getLogger(__name__)
_PUBLISHED: dict[tuple[UUID, str], UUID] = {}
"""By flow run and dataset, the artifact that was made there."""


def publish_progress(dataset: str, table: pa.Table) -> None:
    """Show a table of progress on the page of the current flow run; without a flow run, or a server, nothing happens.

    Args:
        dataset: The dataset's name.
        table: The table of progress.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    place = (context.flow_run.id, dataset)
    rows = table.to_pylist()
    try:
        if place in _PUBLISHED:
            with get_client(sync_client=True) as client:
                change = ArtifactUpdate(data=json.dumps(rows), description=progress_line(table))
                client.update_artifact(_PUBLISHED[place], change)
        else:
            made = create_table_artifact(table=rows, key=f"datagen-{dataset}", description=progress_line(table))
            _PUBLISHED[place] = cast("UUID", made)
    except (PrefectException, httpx.HTTPError) as error:
        # what was generated must not be lost for want of a picture of it
        _LOG.warning("progress of %s is not shown by Prefect: %s", dataset, error)
