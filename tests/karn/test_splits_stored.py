"""Splits: drawn once, stored once, and no environment seed on two sides."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pyarrow.compute as pc
import pytest
from factories import concat_tables, synthetic_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.karn.split_statistics import ALL, feature_statistics, split_statistics
from esper.karn.splits_stored import PARTS, SplitSpec, draw, draw_split, find_split, split_names, stored_split
from esper.karn.store import open_store
from esper.leyline.errors import IntegrityError, SpecError, UnknownNameError
from esper.leyline.keys import derive_seed

REWARD = {"name": "x", "rent_points": 3.0, "scale_points": 9.0}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """Two environments of one task with the same environment seeds, and one with seeds of its own."""
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    behaviours = ("baseline", "random")
    dataset.commit(
        concat_tables(
            synthetic_tables(num_env_seeds=8, behaviours=behaviours, horizon=3),
            synthetic_tables(environment="cifar16-gap", num_env_seeds=5, behaviours=behaviours, horizon=3),
            synthetic_tables(environment="cifar16-real", num_env_seeds=6, behaviours=behaviours, horizon=3),
        )
    )
    return dataset.seal(matrix_id="m", provenance={"rewards": {"digits-gap": REWARD}})


@pytest.fixture
def version(sealed, tmp_path):
    shutil.copytree(sealed.root, tmp_path / "demo")
    for path in (tmp_path / "demo" / "versions").glob("*splits*"):
        path.unlink()
    return open_store(tmp_path).resolve("demo@1")


def seeds_of(version, environment):
    return set(version.table("episodes", filter=pc.field("environment") == environment)["env_seed"].to_pylist())


def test_the_default_split_holds_out_what_learners_held_out_before_it_was_stored(version):
    expected = set()
    for environment in ("digits-gap", "cifar16-gap", "cifar16-real"):
        order = sorted(seeds_of(version, environment), key=lambda seed: derive_seed("held out", seed))
        expected.update(order[: max(1, round(0.15 * len(order)))])
    split = stored_split(version)
    assert set(split.validation) == expected
    assert split.test == ()
    assert set(split.train) | expected == set(version.table("episodes")["env_seed"].to_pylist())


def test_a_split_is_stored_once_and_bound_to_the_digest(version):
    first = stored_split(version)
    assert stored_split(version, spec=SplitSpec()) == first
    path = version.root / "versions" / "1.splits.json"
    before = path.read_bytes()
    with pytest.raises(SpecError, match=r"has a split 'default' already: fractions 0\.85 0\.15 0"):
        stored_split(version, spec=SplitSpec(test_fraction=0.2))
    assert path.read_bytes() == before
    path.write_text(json.dumps(json.loads(before) | {"digest": "0" * 64}))
    with pytest.raises(IntegrityError, match="is of demo@1 with digest 0000"):
        stored_split(version)
    path.write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        stored_split(version)


def test_other_splits_have_names_of_their_own(version):
    stored_split(version)
    other = stored_split(version, "thirds", SplitSpec(validation_fraction=0.3, test_fraction=0.3))
    assert find_split(version, "thirds") == other
    assert split_names(version) == ["default", "thirds"]
    with pytest.raises(UnknownNameError, match="did you mean 'thirds'"):
        find_split(version, "third")
    with pytest.raises(SpecError, match="not allowed"):
        find_split(version, "../up")


def test_writers_that_draw_at_once_get_one_split(version):
    specs = [SplitSpec(validation_fraction=share) for share in (0.2, 0.3, 0.4, 0.5)]
    meeting = threading.Barrier(len(specs))

    def store(spec):
        draw_split(version, "raced", spec)
        meeting.wait()
        try:
            return stored_split(version, "raced", spec)
        except SpecError:
            return None

    with ThreadPoolExecutor(len(specs)) as pool:
        found = [split for split in pool.map(store, specs) if split is not None]
    assert len(found) == 1
    assert found[0] == find_split(version, "raced")


def test_a_held_out_environment_is_test_alone_and_shares_no_seed_with_training(version):
    spec = SplitSpec(test_fraction=0.2, held_out_environments=("cifar16-real",))
    split = stored_split(version, "unseen", spec)
    shared = seeds_of(version, "cifar16-gap") & seeds_of(version, "cifar16-real")
    own = seeds_of(version, "cifar16-real") - shared
    assert shared
    assert own <= set(split.test)
    for seed in seeds_of(version, "cifar16-real"):
        assert split.part_of("cifar16-real", seed) in (None, "test")
    with pytest.raises(UnknownNameError, match="did you mean 'cifar16-real'"):
        stored_split(version, "typo", SplitSpec(test_fraction=0.2, held_out_environments=("cifar16-rael",)))


def test_an_environment_cannot_be_held_out_without_a_test_seed(version):
    with pytest.raises(SpecError, match="no seed is kept for a test"):
        stored_split(version, "unseen", SplitSpec(held_out_environments=("cifar16-gap",)))


def test_seeds_without_a_usable_episode_count_for_no_share(tmp_path):
    dataset = open_store(tmp_path).dataset("demo")
    tables = synthetic_tables(num_env_seeds=8, behaviours=("baseline",), horizon=3)
    broken = set(tables["episodes"]["env_seed"].unique().to_pylist()[:5])
    invalid = pc.invert(pc.is_in(tables["episodes"]["env_seed"], pc.cast(list(broken), "int64")))
    place = tables["episodes"].schema.get_field_index("control_valid")
    tables["episodes"] = tables["episodes"].set_column(place, tables["episodes"].schema.field(place), invalid)
    dataset.commit(tables)
    split = stored_split(dataset.seal(matrix_id="m", provenance={}))
    assert split.validation == ()
    assert broken <= set(split.train)


@lru_cache(maxsize=1)
def lineages(version):
    rows = version.table("steps", columns=["environment", "env_seed", "host_key"])
    return rows.group_by(["environment", "env_seed", "host_key"]).aggregate([]).to_pylist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    validation=st.floats(0, 0.6),
    test=st.floats(0, 0.39),
    held=st.sets(st.sampled_from(["digits-gap", "cifar16-gap", "cifar16-real"]), max_size=2),
)
def test_no_environment_seed_and_no_lineage_is_in_two_splits(sealed, validation, test, held):
    spec = SplitSpec(validation_fraction=validation, test_fraction=test, held_out_environments=tuple(sorted(held)))
    try:
        split = draw_split(sealed, "any", spec)
    except SpecError:
        assert held
        return
    parts_of_seed, parts_of_lineage = {}, {}
    for row in lineages(sealed):
        part = split.part_of(row["environment"], row["env_seed"])
        if part is not None:
            parts_of_seed.setdefault(row["env_seed"], set()).add(part)
            parts_of_lineage.setdefault(row["host_key"], set()).add(part)
        assert part == "test" or part is None or row["environment"] not in held
    assert all(len(parts) == 1 for parts in parts_of_seed.values())
    assert all(len(parts) == 1 for parts in parts_of_lineage.values())
    everywhere = set().union(*(split.seeds(part) for part in PARTS))
    assert everywhere == {row["env_seed"] for row in lineages(sealed)}
    assert sum(len(split.seeds(part)) for part in PARTS) == len(everywhere)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.sets(st.integers(0, 60), max_size=30), max_size=4),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
)
def test_each_environment_keeps_a_seed_of_its_own_draw_to_train_on(seeds, validation, test):
    held, tested = draw(seeds, validation, test)
    assert not held & tested
    for own in seeds.values():
        alone, alone_tested = draw({"it": own}, validation, test)
        assert len(alone | alone_tested) < max(len(own), 1)
        assert alone <= held


def test_statistics_per_split_add_up_and_returns_are_those_of_the_reward(version):
    split = stored_split(version)
    rows = split_statistics(version, split).to_pylist()
    whole = {row["split"]: row for row in rows if row["environment"] == ALL}
    assert sum(row["episodes"] for row in whole.values()) == version.manifest.counts["episodes"]
    assert sum(row["decisions"] for row in whole.values()) == version.manifest.counts["decisions"]
    assert {name: row["env_seeds"] for name, row in whole.items()} == {
        "train": len(split.train),
        "validation": len(split.validation),
    }
    steps = version.table("steps", filter=(pc.field("environment") == "digits-gap") & ~pc.field("is_last"))
    totals = {}
    for row in steps.select(["episode_id", "env_seed", "reward_accuracy_points", "reward_growth_log2"]).to_pylist():
        if row["env_seed"] in split.train:
            reward = (row["reward_accuracy_points"] - 3.0 * row["reward_growth_log2"]) / 9.0
            totals[row["episode_id"]] = totals.get(row["episode_id"], 0.0) + reward
    (gap,) = [row for row in rows if (row["split"], row["environment"]) == ("train", "digits-gap")]
    assert gap["return_mean"] == pytest.approx(sum(totals.values()) / len(totals))
    assert sum(gap[name] for name in gap if name.startswith("share_")) == pytest.approx(1)
    (real,) = [row for row in rows if (row["split"], row["environment"]) == ("train", "cifar16-real")]
    assert real["return_mean"] is None


def test_feature_statistics_tell_mean_and_missing_share(version):
    split = stored_split(version)
    rows = feature_statistics(version, split).to_pylist()
    loss = next(row for row in rows if (row["split"], row["feature"]) == ("validation", "train_loss"))
    steps = version.table("steps", columns=["env_seed", "train_loss", "is_last"], filter=~pc.field("is_last"))
    own = [row["train_loss"] for row in steps.to_pylist() if row["env_seed"] in split.validation]
    known = [value for value in own if value is not None]
    assert loss["rows"] == len(own)
    assert loss["missing_share"] == pytest.approx(1 - len(known) / len(own))
    assert loss["mean"] == pytest.approx(sum(known) / len(known), rel=1e-6)
    assert loss["unit"] == "nats"
