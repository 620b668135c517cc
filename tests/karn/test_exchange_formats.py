"""Exports in the formats of others, each read back by who reads that format."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.exchange_minari import dataset_id, export_minari
from esper.karn.exchange_parquet import export_parquet
from esper.karn.splits_stored import SplitSpec, stored_split
from esper.karn.store import open_store
from esper.leyline.errors import SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import load_transitions

ENVIRONMENTS = ("digits-gap", "digits-baseline")
REWARDS = {name: load("rewards", name, RewardSpec) for name in ENVIRONMENTS}


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    tables = concat_tables(
        *(synthetic_tables(environment=name, num_env_seeds=4, horizon=7) for name in ENVIRONMENTS),
        synthetic_tables(num_env_seeds=1, role="evaluation", horizon=7),
    )
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(tables)
    rewards = {name: spec.model_dump(mode="json") for name, spec in REWARDS.items()}
    return dataset.seal(matrix_id="m", provenance={"rewards": rewards, "skeleton": True})


@pytest.fixture(scope="module")
def parquet(version, tmp_path_factory):
    return export_parquet(version, tmp_path_factory.mktemp("hub") / "demo", rows_per_file=100)


def test_the_parquet_files_hold_every_row_once_and_full_files_are_followed_by_another(version, parquet):
    for table in ("steps", "episodes", "costs"):
        keys = [
            (key, "ascending") for key in ("env_seed", "episode_id", "step") if key in version.table(table).schema.names
        ]
        columns = [name for name in version.table(table).schema.names if name not in ("commit_id", "attempt")]
        found = ds.dataset(parquet / "data" / table).to_table(columns=columns).sort_by(keys)
        assert found.equals(version.table(table, columns=columns).sort_by(keys)), table
    assert len(list((parquet / "data" / "steps").glob("train-*.parquet"))) > 1
    assert max(part.count_rows() for part in ds.dataset(parquet / "data" / "steps").get_fragments()) == 100


def test_no_environment_seed_of_the_data_is_in_two_splits_and_evaluation_is_in_none(version, parquet):
    split = stored_split(version)
    seen = {}
    for part in ("train", "validation", "other"):
        rows = pl.read_parquet(parquet / f"data/steps/{part}-*.parquet")
        seen[part] = set(rows["env_seed"])
        if part == "other":
            assert set(rows["role"]) == {"evaluation"}
        else:
            assert set(rows["role"]) == {"data"}
            assert seen[part] == set(split.seeds(part))
    assert not seen["train"] & seen["validation"]


def test_held_out_environments_are_in_the_test_alone(version, tmp_path, monkeypatch):
    from esper.karn import exchange_parquet

    spec = SplitSpec(test_fraction=0.3, held_out_environments=("digits-baseline",))
    held = stored_split(version, "held", spec)
    monkeypatch.setattr(exchange_parquet, "stored_split", lambda _: held)
    folder = export_parquet(version, tmp_path / "demo")
    where = {
        part: set(pl.read_parquet(folder / f"data/episodes/{part}-*.parquet")["environment"])
        for part in ("train", "test")
    }
    assert where["train"] == {"digits-gap"}
    assert "digits-baseline" in where["test"]


def test_the_hub_library_reads_configurations_splits_and_values(version, parquet, tmp_path):
    hub = pytest.importorskip("datasets")
    cache = str(tmp_path / "cache")
    steps = hub.load_dataset(str(parquet), "steps", cache_dir=cache)
    assert list(steps) == ["train", "validation", "other"]
    assert sum(part.num_rows for part in steps.values()) == version.table("steps").num_rows
    episodes = hub.load_dataset(str(parquet), "episodes", split="validation", cache_dir=cache)
    wanted = version.table("episodes", columns=["episode_id", "final_val_accuracy", "env_seed"])
    wanted = wanted.filter(pc.is_in(wanted["episode_id"], episodes.data["episode_id"].combine_chunks()))
    assert episodes["final_val_accuracy"] == wanted["final_val_accuracy"].to_pylist()
    assert hub.get_dataset_config_names(str(parquet)) == ["steps", "episodes", "costs"]


def test_the_card_says_what_is_made_up(parquet):
    text = (parquet / "README.md").read_text()
    assert "SKELETON" in text
    assert text.startswith("---\n")


def test_nothing_is_left_of_an_export_that_was_interrupted(version, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    for export in (export_parquet, export_minari):
        with pytest.raises(KeyboardInterrupt):
            export(version, tmp_path / "out", report=stop)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SpecError, match="there already"):
        export_parquet(version, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_minari_reads_the_episodes_with_their_returns(version, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    export_minari(version, tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    found = minari.load_dataset(dataset_id(version))
    assert list(minari.list_local_datasets()) == ["esper/demo-v1"]
    ours = load_transitions(version, "v4", REWARDS)
    first = np.unique(ours.episode_N, return_index=True)[1]
    assert found.total_episodes == len(first)
    assert found.total_steps == len(ours)
    returns = [episode.rewards.sum() for episode in found.iterate_episodes()]
    np.testing.assert_allclose(returns, ours.return_N[first], rtol=1e-12, atol=1e-12)


def test_minari_has_observations_actions_masks_and_what_an_episode_is(version, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    export_minari(version, tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    found = minari.load_dataset(dataset_id(version))
    ours = load_transitions(version, "v4", REWARDS)
    actions = np.array(found.storage.metadata["actions"], np.int8)
    assert found.action_space.n == len(actions)
    about = list(found.storage.get_episode_metadata(range(found.total_episodes)))
    rows = {row["episode_id"]: row for row in version.table("episodes").to_pylist()}
    for index, episode in enumerate(found.iterate_episodes()):
        mine = ours.episode_N == index
        states = ours.state_N[mine]
        np.testing.assert_array_equal(episode.observations[:-1], ours.obs_MV[states])
        np.testing.assert_array_equal(episode.observations[-1], ours.obs_MV[states[-1] + 1])
        np.testing.assert_array_equal(actions[episode.actions], ours.action_NA[mine])
        np.testing.assert_array_equal(episode.infos["mask"][:-1], ours.mask_MT[states])
        np.testing.assert_allclose(episode.infos["behaviour_logp"][:-1], ours.logp_N[mine])
        assert episode.terminations.tolist() == [False] * 6 + [True]
        assert not episode.truncations.any()
        row = rows[about[index]["options"]["episode_id"]]
        assert about[index]["options"]["controller"] == row["controller"]
        assert about[index]["seed"] == row["env_seed"]
    assert found.storage.metadata["esper_skeleton"] is True


def test_a_version_without_rewards_is_no_minari_data(tmp_path):
    dataset = open_store(tmp_path / "store").dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=1))
    version = dataset.seal(matrix_id="m", provenance={})
    with pytest.raises(SpecError, match="rewards"):
        export_minari(version, tmp_path / "out")
