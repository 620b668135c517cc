"""A store with one small dataset for the commands that read."""

from __future__ import annotations

import pytest
from factories import synthetic_tables

from esper.karn.store import open_store


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory):
    """A store whose only dataset is demo@1."""
    root = tmp_path_factory.mktemp("demo-store")
    dataset = open_store(root).dataset("demo")
    dataset.commit(synthetic_tables())
    dataset.seal(matrix_id="matrix-1", provenance={"machine": "test"})
    return root
