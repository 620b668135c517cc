from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from factories import synthetic_tables

from esper.karn.diffing import diff
from esper.karn.store import open_store

PROVENANCE = {
    "code_commit": "aaa",
    "packages": {"numpy": "1", "torch": "2"},
    "rewards": {"digits-gap": {"name": "x", "rent_points": 3.0, "scale_points": 9.0}},
    "matrix": {"cells": [{"replicates": 1}, {"replicates": 2}]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """demo@1; demo@2 with more episodes; changed@1 with demo@1's ids, one other step and one other outcome."""
    opened = open_store(tmp_path_factory.mktemp("store"))
    tables = synthetic_tables(num_env_seeds=2, horizon=3)
    demo = opened.dataset("demo")
    demo.commit(tables)
    demo.seal(matrix_id="m", provenance=PROVENANCE)
    demo.commit(synthetic_tables(num_env_seeds=2, horizon=3, behaviours=("random",), first_replicate=10))
    newer = PROVENANCE | {"code_commit": "bbb", "packages": {"numpy": "1", "torch": "3", "polars": "1"}}
    demo.seal(matrix_id="m2", provenance=newer | {"matrix": {"cells": [{"replicates": 1}, {"replicates": 4}]}})
    opened.dataset("changed").commit(altered(tables))
    opened.dataset("changed").seal(matrix_id="m", provenance={})
    return opened


def altered(tables):
    """One value of the first row of `steps`, and one of the last row of `episodes`."""
    steps, episodes = tables["steps"], tables["episodes"]
    loss = steps["val_loss"].to_pylist()
    loss[0] += 1
    flops = episodes["train_flops"].to_pylist()
    flops[-1] += 1
    commits = pa.array(["another"] * len(episodes))
    return tables | {
        "steps": with_column(steps, "val_loss", pa.array(loss, pa.float32())),
        "episodes": with_column(with_column(episodes, "train_flops", pa.array(flops)), "code_commit", commits),
    }


def with_column(table, name, values):
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def test_a_version_does_not_differ_from_itself(store):
    found = diff(store.resolve("demo@1"), store.resolve("demo@1"))
    assert found.episodes.num_rows == found.cells.num_rows == 0
    assert found.facts == found.provenance == []


def test_what_was_added_is_told_by_episode_and_by_cell_and_backwards_it_was_removed(store):
    old, new = store.resolve("demo@1"), store.resolve("demo@2")
    found = diff(old, new)
    assert [found.num_episodes(change) for change in ("added", "removed", "changed")] == [2, 0, 0]
    (cell,) = found.cells.to_pylist()
    assert (cell["controller"], cell["before"], cell["after"], cell["added"]) == ("random", 2, 4, 2)
    before = set(old.table("episodes")["episode_id"].to_pylist())
    assert not before & set(found.episodes["episode_id"].to_pylist())
    back = diff(new, old)
    assert back.episodes["change"].to_pylist() == ["removed"] * 2
    assert back.cells["removed"].to_pylist() == [2]


def test_provenance_keys_that_differ_are_named_with_both_values(store):
    found = diff(store.resolve("demo@1"), store.resolve("demo@2"))
    assert found.provenance == [
        ("code_commit", "aaa", "bbb"),
        ("matrix.cells.1.replicates", "2", "4"),
        ("packages.polars", None, "1"),
        ("packages.torch", "2", "3"),
    ]
    facts = {name: (old, new) for name, old, new in found.facts}
    assert facts["matrix"] == ("m", "m2")
    assert facts["episodes"] == ("6", "8")
    assert "schema version" not in facts


def test_other_rows_under_the_same_id_are_changed_episodes_of_another_dataset(store):
    old, new = store.resolve("demo@1"), store.resolve("changed@1")
    found = diff(old, new)
    assert [found.num_episodes(change) for change in ("added", "removed", "changed")] == [0, 0, 2]
    assert sorted(found.episodes["differs_in"].to_pylist()) == ["episodes", "steps"]
    assert pc.sum(found.cells["changed"]).as_py() == 2


def test_rows_of_an_older_schema_are_compared_by_its_columns(store):
    old, new = store.resolve("demo@1"), store.resolve("demo@1")
    old.manifest = old.manifest.model_copy(update={"schema_version": 1})
    found = diff(old, new)
    assert found.episodes.num_rows == 0
    assert ("schema version", "1", "2") in found.facts
