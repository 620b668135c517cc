"""States that stay on disk train the same policy as states in memory, and do not become resident on the way."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import concat_tables, synthetic_tables
from hypothesis import given
from hypothesis import strategies as st
from memory_task import memory_transitions
from test_load_tensors import same

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.leyline.views import get_view
from esper.simic import batches, load_tensors
from esper.simic.batches import Transitions, from_steps, load_transitions
from esper.simic.bc import BcRecipe, RwbcRecipe
from esper.simic.cql import CqlRecipe
from esper.simic.iql import IqlRecipe, fit_iql
from esper.simic.row_files import ENVIRONMENT_VARIABLE, FileRows, PackedRows, memory_budget
from esper.simic.training import train
from esper.tamiyo.networks import NetworkSpec

REWARDS = {"digits-gap": load("rewards", "digits-gap", RewardSpec)}
SMALL = {"network": NetworkSpec(hidden=16, slot_hidden=8), "steps": 6, "batch_size": 24, "log_every": 3}
RECURRENT = {**SMALL, "network": NetworkSpec(hidden=16, slot_hidden=8, trunk="gru", view="v3")}
RECIPES = {
    "bc": BcRecipe(**SMALL),
    "bc recurrent": BcRecipe(**RECURRENT),
    "rwbc": RwbcRecipe(**SMALL),
    "iql": IqlRecipe(**SMALL, value_steps=6, weighting="return"),
    "iql recurrent": IqlRecipe(**RECURRENT, value_steps=6),
    "cql": CqlRecipe(**SMALL, monte_carlo_bound=True),
}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=4, behaviours=("baseline",), horizon=3))
    return dataset.seal(matrix_id="test", provenance={})


@pytest.mark.parametrize("case", RECIPES)
def test_the_policy_is_the_same_to_the_byte_with_states_on_disk(version, case, tmp_path, monkeypatch):
    algorithm = case.split()[0]
    digests, loaded = [], []
    original = load_tensors._read

    def read(path, budget_bytes):
        found = original(path, budget_bytes)
        loaded.append(None if found is None else type(found.obs_MV))
        return found

    monkeypatch.setattr(load_tensors, "_read", read)
    for budget_mb in ("0", "100000"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, budget_mb)
        policy = train(
            algorithm, version, rewards=REWARDS, out=tmp_path / budget_mb, seed=0, recipe=RECIPES[case],
            override_health="a test", on_log=lambda _: None,
        )  # fmt: skip
        digests.append(policy.digest)
    assert [kind for kind in loaded if kind is not None] == [FileRows, np.ndarray]
    assert digests[0] == digests[1]


ENVS = ("digits-gap", "digits-baseline")


def test_blocks_of_any_size_give_the_transitions_of_all_rows_at_once(tmp_path, monkeypatch):
    dataset = open_store(tmp_path).dataset("two")
    made = [synthetic_tables(behaviours=("baseline",), environment=name, horizon=3) for name in ENVS]
    dataset.commit(concat_tables(*made))
    version = dataset.seal(matrix_id="test", provenance={})
    rewards = {name: load("rewards", name, RewardSpec) for name in ENVS}
    whole = from_steps(version.table("steps"), "v3", rewards)
    assert set(whole.environments) == set(ENVS)
    for rows in (1, 7, 10_000):
        monkeypatch.setattr(batches, "BLOCK_ROWS", rows)
        assert same(load_transitions(version, "v3", rewards), whole)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[np.ndarray, FileRows]:
    array = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_bytes(b"before" + array.tobytes() + b"behind")
    return array, FileRows(path, 6, array.shape, array.dtype)


@given(rows=st.lists(st.integers(0, 49), max_size=30), runs=st.integers(1, 9))
def test_rows_of_a_file_are_indexed_as_an_array_is(stored, rows, runs):
    array, found = stored
    index = (np.array(rows, dtype=np.int64)[:, None] + np.arange(runs)) % 50
    for wanted in (index, index.ravel(), slice(runs, 40, runs), slice(None)):
        got = found[wanted]
        assert got.flags.writeable
        np.testing.assert_array_equal(got, array[wanted])


@given(bits=st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=9))
def test_packed_rows_are_the_booleans_that_they_were(bits):
    mask = np.array(bits)
    packed = PackedRows.of([mask[:2], mask[2:]], 11)
    assert packed.shape == mask.shape
    np.testing.assert_array_equal(packed[:], mask)
    index = np.arange(2 * len(mask)).reshape(2, -1) % len(mask)
    np.testing.assert_array_equal(packed[index], mask[index])
    assert packed[index].dtype == bool


def test_a_row_that_is_not_there_is_an_error_whether_outside_or_cut_off(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(40))
    rows = FileRows(path, 0, (5, 2), np.dtype("<f4"))
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="of 5"):
            rows[np.array([0, wrong])]
    path.write_bytes(bytes(30))
    with pytest.raises(IntegrityError, match="ends early"):
        rows[:]


def test_the_budget_is_what_the_environment_says_else_half_of_what_is_left(monkeypatch):
    assert memory_budget("250") == 250_000_000
    assert memory_budget("0") == 0
    with pytest.raises(SpecError, match="whole number of megabytes"):
        memory_budget("1 GB")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert 1_000_000 < memory_budget() < 1 << 50


EPISODES_PER_BLOCK, NUM_BLOCKS = 500, 16


def wide_blocks() -> Iterator[Transitions]:
    """90 MB of states, made a block at a time."""
    part, _ = memory_transitions(EPISODES_PER_BLOCK)
    num_states, num_episodes = len(part.obs_MV), EPISODES_PER_BLOCK
    generator = np.random.default_rng(0)
    for block in range(NUM_BLOCKS):
        yield replace(
            part,
            view="v4",
            obs_MV=generator.normal(size=(num_states, get_view("v4").width)).astype(np.float32),
            state_N=part.state_N + block * num_states,
            next_N=part.next_N + block * num_states,
            episode_N=part.episode_N + block * num_episodes,
            episode_M=part.episode_M + block * num_episodes,
        )


def growth_mb(work: Callable[[], object]) -> float:
    """Return by how much the largest resident memory during a piece of work exceeds what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 1e3


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_peak_memory_does_not_hold_the_states_neither_making_the_file_nor_training(tmp_path):
    path = tmp_path / "kept"
    recipe = IqlRecipe(**{**SMALL, "batch_size": 256}, value_steps=6)

    def learn(budget_bytes: int) -> None:
        data = load_tensors._read(path, budget_bytes)
        held = data.env_seed_N >= 8
        fit_iql(data.select(~held), data.select(held), recipe, seed=0, on_log=lambda _: None)

    learn_nothing(recipe)
    made = growth_mb(lambda: load_tensors._write(path, wide_blocks()))
    size = path.stat().st_size / 1e6
    assert size > 90
    from_disk, in_memory = growth_mb(lambda: learn(0)), growth_mb(lambda: learn(1 << 40))
    assert made < 0.5 * size
    assert from_disk < 0.7 * size
    assert in_memory > 0.85 * size


def learn_nothing(recipe: IqlRecipe) -> None:
    """What a process imports and allocates once is not part of what is measured."""
    data, _ = memory_transitions(30)
    small = recipe.model_copy(update={"network": recipe.network.model_copy(update={"view": "v1"})})
    fit_iql(data, data, small, seed=0, on_log=lambda _: None)
