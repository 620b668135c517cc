"""The replay buffer file, read and learned from by d3rlpy itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from factories import synthetic_tables

from esper.karn.store import open_store
from esper.leyline.errors import SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import load_transitions
from esper.simic.d3rlpy_export import export_d3rlpy, import_d3rlpy, library_randomness
from esper.tamiyo.networks import single_thread

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=3, behaviours=("baseline", "random")))
    return dataset.seal(matrix_id="m", provenance={"skeleton": True})


def test_d3rlpy_reads_the_file_and_learns_from_it(version, tmp_path):
    path = tmp_path / "demo-1.h5"
    export_d3rlpy(version, path, view="v4", rewards=REWARDS)
    d3rlpy = import_d3rlpy()
    with path.open("rb") as file:
        buffer = d3rlpy.dataset.ReplayBuffer.load(file, d3rlpy.dataset.InfiniteBuffer())
    ours = load_transitions(version, "v4", REWARDS)
    returns = [episode.rewards.sum() for episode in buffer.episodes]
    np.testing.assert_allclose(returns, ours.return_N[np.unique(ours.episode_N, return_index=True)[1]], atol=1e-5)
    listing = json.loads((tmp_path / "demo-1.h5.actions.json").read_text())
    assert (listing["digest"], listing["skeleton"]) == (version.manifest.digest, True)
    with single_thread(), library_randomness(0):
        learner = d3rlpy.algos.DiscreteCQLConfig(batch_size=16).create(device="cpu:0")
        learner.build_with_dataset(buffer)
        before = learner.predict_value(ours.obs_MV[:5], np.zeros(5, int))
        losses = [learner.update(buffer.sample_transition_batch(16))["loss"] for _ in range(5)]
    used = max(int(episode.actions.max()) for episode in buffer.episodes)
    assert learner.action_size == used + 1 <= len(listing["actions"])  # the library counts what occurs
    assert np.isfinite(losses).all()
    assert not np.allclose(before, learner.predict_value(ours.obs_MV[:5], np.zeros(5, int)))


def test_a_file_that_is_there_is_not_written_over(version, tmp_path):
    path = tmp_path / "demo-1.h5"
    path.write_text("mine")
    with pytest.raises(SpecError, match="there already"):
        export_d3rlpy(version, path, view="v1", rewards=REWARDS)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("demo-1.h5", "mine")]
