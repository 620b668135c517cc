"""Kept tensors are what the rows give, and a damaged or outdated file is never believed."""

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from factories import synthetic_tables

from esper.karn.store import open_store
from esper.karn.versions import Version
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.library import load
from esper.leyline.rewards import RewardSpec
from esper.simic import load_tensors as module
from esper.simic.batches import Transitions, load_transitions
from esper.simic.load_tensors import load_tensors

REWARD = load("rewards", "digits-gap", RewardSpec)
REWARDS = {"digits-gap": REWARD}


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> Version:
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("small")
    dataset.commit(synthetic_tables(num_env_seeds=2))
    return dataset.seal(matrix_id="test", provenance={})


@pytest.fixture(autouse=True)
def _no_kept_file(version):
    for path in kept(version):
        path.unlink()


def kept(version: Version) -> list[Path]:
    return sorted((version.root / module.FOLDER).glob("*"))


def same(found: Transitions, expected: Transitions) -> bool:
    for name in Transitions.__slots__:
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype, name
            assert np.array_equal(one, other, equal_nan=other.dtype.kind == "f"), name
        else:
            assert (one, type(one)) == (other, type(other)), name
    return True


@pytest.mark.parametrize("view", ["v1", "v4"])
def test_first_and_second_loading_give_what_the_rows_give(version, view, monkeypatch):
    expected = load_transitions(version, view, REWARDS)
    assert same(load_tensors(version, view, REWARDS), expected)
    monkeypatch.setattr(module, "load_transitions", None)  # the second time the rows are not read
    assert same(load_tensors(version, view, REWARDS), expected)
    assert len(kept(version)) == 1


def test_writing_into_the_arrays_changes_no_file(version):
    expected = load_transitions(version, "v1", REWARDS)
    load_tensors(version, "v1", REWARDS)
    load_tensors(version, "v1", REWARDS).obs_MV[:] = 7
    assert same(load_tensors(version, "v1", REWARDS), expected)


def test_another_view_reward_selection_or_code_is_another_file(version, monkeypatch):
    load_tensors(version, "v1", REWARDS)
    load_tensors(version, "v3", REWARDS)
    cheaper = {"digits-gap": REWARD.model_copy(update={"rent_points": 0.5})}
    assert not np.array_equal(
        load_tensors(version, "v1", cheaper).reward_N, load_tensors(version, "v1", REWARDS).reward_N
    )
    some = load_tensors(version, "v1", REWARDS, keep=pc.field("replicate") == 0)
    assert 0 < len(some) < len(load_tensors(version, "v1", REWARDS))
    monkeypatch.setattr(module, "_code_digest", lambda: "other")
    load_tensors(version, "v1", REWARDS)
    assert len(kept(version)) == 5


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_a_file_cut_short_is_made_again(version, length):
    expected = load_transitions(version, "v1", REWARDS)
    load_tensors(version, "v1", REWARDS)
    (path,) = kept(version)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:length])
    assert same(load_tensors(version, "v1", REWARDS), expected)
    assert path.read_bytes() == whole


def test_a_file_with_one_changed_byte_is_made_again(version):
    expected = load_transitions(version, "v1", REWARDS)
    load_tensors(version, "v1", REWARDS)
    (path,) = kept(version)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-len(whole) // 3] ^= 1
    path.unlink()
    path.write_bytes(changed)
    assert same(load_tensors(version, "v1", REWARDS), expected)
    assert path.read_bytes() == whole


def test_a_version_whose_files_are_gone_is_an_error_though_its_tensors_are_kept(version):
    load_tensors(version, "v1", REWARDS)
    file = version.files("steps")[0]
    hidden = file.with_suffix(".hidden")
    file.rename(hidden)
    try:
        with pytest.raises(IntegrityError):
            load_tensors(version, "v1", REWARDS)
    finally:
        hidden.rename(file)


def test_roles_that_are_not_for_learning_are_refused(version):
    with pytest.raises(SpecError):
        load_tensors(version, "v1", REWARDS, roles=("evaluation",))


def test_where_nothing_can_be_written_the_rows_are_read(version, monkeypatch):
    def fails(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", fails)
    assert same(load_tensors(version, "v1", REWARDS), load_transitions(version, "v1", REWARDS))
    assert kept(version) == []
