"""What learners hold out is the version's stored split, and without any wish it is what it was before it was stored."""

from __future__ import annotations

import numpy as np
import pytest
from factories import concat_tables, synthetic_tables

from esper.karn.splits_stored import SplitSpec, stored_split
from esper.karn.store import open_store
from esper.leyline.keys import derive_seed
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic.batches import load_transitions
from esper.simic.bc import BcRecipe
from esper.simic.splits import held_out_rows, split_rows
from esper.simic.training import train
from esper.tamiyo.checkpoints import read_card
from esper.tamiyo.networks import NetworkSpec

NAMES = ("digits-gap", "cifar16-gap", "cifar16-real")
REWARDS = {name: load("rewards", name, RewardSpec) for name in NAMES}


@pytest.fixture
def version(tmp_path):
    dataset = open_store(tmp_path / "store").dataset("mixed")
    sizes = dict(zip(NAMES, (9, 5, 6)))
    parts = [
        synthetic_tables(environment=name, num_env_seeds=size, behaviours=("baseline",), horizon=3)
        for name, size in sizes.items()
    ]
    dataset.commit(concat_tables(*parts))
    return dataset.seal(matrix_id="m", provenance={})


def test_the_default_split_gives_the_rows_that_the_draw_over_the_transitions_gives(version):
    transitions = load_transitions(version, "v4", REWARDS)
    chosen = set()
    for index, _ in enumerate(transitions.environments):
        seeds = np.unique(transitions.env_seed_N[transitions.environment_N == index]).tolist()
        seeds.sort(key=lambda seed: derive_seed("held out", seed))
        chosen.update(seeds[: max(1, round(0.15 * len(seeds)))])
    expected = np.isin(transitions.env_seed_N, sorted(chosen))
    learned, held = split_rows(transitions, stored_split(version))
    np.testing.assert_array_equal(held, expected)
    np.testing.assert_array_equal(learned, ~expected)
    np.testing.assert_array_equal(held_out_rows(transitions), expected)


def test_training_sees_no_test_seed_and_no_held_out_environment(version, tmp_path):
    spec = SplitSpec(validation_fraction=0.2, test_fraction=0.2, held_out_environments=("cifar16-real",))
    split = stored_split(version, "unseen", spec)
    transitions = load_transitions(version, "v4", REWARDS)
    learned, held = split_rows(transitions, split)
    for rows, seeds in ((learned, split.train), (held, split.validation)):
        assert rows.any()
        assert set(transitions.env_seed_N[rows].tolist()) <= set(seeds)
        names = {transitions.environments[index] for index in transitions.environment_N[rows].tolist()}
        assert "cifar16-real" not in names
    recipe = BcRecipe(network=NetworkSpec(hidden=16, slot_hidden=8), steps=2, batch_size=8, log_every=2)
    train(
        "bc",
        version,
        rewards=REWARDS,
        out=tmp_path / "policy",
        seed=0,
        override_health="a test",
        recipe=recipe,
        split="unseen",
        on_log=lambda _: None,
    )
    card = read_card(tmp_path / "policy")
    assert (card.metrics["training_rows"], card.metrics["held_out_rows"]) == (learned.sum(), held.sum())
    assert card.split == "unseen"
    assert "stored split `unseen`" in (tmp_path / "policy" / "README.md").read_text()
