"""However episodes are cut into commits, in whatever order, however often repeated: the same rows and digest."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from factories import select_episodes, synthetic_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.karn.store import open_store


@lru_cache(maxsize=1)
def whole() -> dict[str, pa.Table]:
    return synthetic_tables(num_env_seeds=2, behaviours=("baseline", "random"), horizon=3, seed=5)


@lru_cache(maxsize=1)
def reference() -> tuple[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_store(folder).dataset("reference")
        dataset.commit(whole())
        version = dataset.seal(matrix_id="m", provenance={})
        return version.manifest.digest, version.table("steps").num_rows


NUM_EPISODES = whole()["episodes"].num_rows


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, NUM_EPISODES - 1), min_size=1, unique=True), max_size=4), st.randoms())
def test_any_partition_into_commits_gives_the_same_version(parts, random):
    ids = whole()["episodes"]["episode_id"].to_pylist()
    commits = [[ids[index] for index in part] for part in parts] + [list(ids)]
    random.shuffle(commits)
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_store(Path(folder)).dataset("cut")
        for part in commits:
            dataset.commit(select_episodes(whole(), part))
        version = dataset.seal(matrix_id="m", provenance={})
        assert (version.manifest.digest, version.table("steps").num_rows) == reference()
        assert sorted(version.table("episodes")["episode_id"].to_pylist()) == sorted(ids)
        assert version.verify() == []
