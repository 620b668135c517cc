"""Views for whoever owns the data, against leyline's rewards and against sums over the rows that went in."""

from __future__ import annotations

from typing import get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from factories import concat_tables, select_episodes, synthetic_tables

from esper.karn.catalogue import query
from esper.karn.store import open_store
from esper.leyline.errors import IntegrityError
from esper.leyline.library import load, names
from esper.leyline.rewards import RewardSpec, combine
from esper.simic.batches import from_steps

OWN = RewardSpec(name="digits-gap", rent_points=0.37, scale_points=4.1)
MODES = get_args(RewardSpec.model_fields["mode"].annotation)
PLANNED = {"environment": "digits-gap", "environment_id": "e", "role": "data", "root": "host"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tables = concat_tables(
        synthetic_tables(horizon=10, num_env_seeds=3, refusal_rate=0.3),
        synthetic_tables(environment="digits-baseline", num_env_seeds=1),
    )
    episodes = tables["episodes"]
    failed = episodes["episode_id"][0].as_py()
    outcome = pc.if_else(pc.equal(episodes["episode_id"], failed), "failed", episodes["outcome"])
    tables["episodes"] = episodes.set_column(
        episodes.schema.get_field_index("outcome"), episodes.field("outcome"), outcome
    )
    dataset = open_store(tmp_path_factory.mktemp("store")).dataset("demo")
    dataset.commit(tables)
    baseline = load("rewards", "digits-baseline", RewardSpec)
    provenance = {
        "rewards": {"digits-gap": OWN.model_dump(mode="json"), "digits-baseline": baseline.model_dump(mode="json")},
        "planned": [
            PLANNED | {"controller": "baseline", "epsilon": 0.0, "planned": 5},
            PLANNED | {"controller": "aggressive", "epsilon": 0.1, "planned": 2},
        ],
    }
    return dataset.seal(matrix_id="m", provenance=provenance), tables, failed


def frame(version, sql):
    return pl.from_arrow(query(version, sql))


def specs():
    """Every reward that SQL must know, by its name there."""
    library = {name: load("rewards", name, RewardSpec) for name in names("rewards")}
    return {**library, "digits-gap": OWN, "digits-gap@library": library["digits-gap"]}


def decisions(tables):
    steps = pl.from_arrow(tables["steps"]).filter(~pl.col("is_last")).sort("episode_id", "step")
    return steps.partition_by("episode_id", as_dict=True, maintain_order=True)


def test_every_reward_in_every_mode_agrees_with_leyline(made):
    version, tables, _ = made
    found = frame(version, "SELECT * FROM returns_by_reward")
    known, episodes = specs(), decisions(tables)
    assert set(found["reward"]) == set(known)
    assert set(found["mode"]) == set(MODES)
    assert found.height == len(episodes) * len(known) * len(MODES)
    for row in found.iter_rows(named=True):
        steps = episodes[(row["episode_id"],)]
        points, growth = (steps[f"reward_{name}"].to_numpy() for name in ("accuracy_points", "growth_log2"))
        spec = known[row["reward"]].model_copy(update={"mode": row["mode"]})
        added = (np.abs(points) + spec.rent_points * np.abs(growth)).sum() / spec.scale_points
        assert row["return"] == pytest.approx(combine(spec, points, growth).sum(), rel=1e-9, abs=1e-14 * added)
        assert row["own"] == (row["reward"] == row["environment"])


def test_the_reward_of_each_decision_agrees_with_leyline(made):
    version, tables, _ = made
    found = frame(version, "SELECT * FROM decision_rewards ORDER BY episode_id, step")
    known, episodes = specs(), decisions(tables)
    for (reward, mode, episode_id), rows in found.group_by("reward", "mode", "episode_id", maintain_order=True):
        steps = episodes[(episode_id,)]
        spec = known[reward].model_copy(update={"mode": mode})
        points, growth = (steps[f"reward_{name}"].to_numpy() for name in ("accuracy_points", "growth_log2"))
        np.testing.assert_allclose(rows["value"], combine(spec, points, growth), rtol=1e-9, atol=1e-12)
    assert found.height == sum(map(len, episodes.values())) * len(known) * len(MODES)


def test_own_returns_are_those_that_learners_see(made):
    version, tables, _ = made
    own = "SELECT episode_id, return FROM returns_by_reward WHERE own AND mode = 'gain' ORDER BY env_seed, episode_id"
    rewards = {"digits-gap": OWN, "digits-baseline": specs()["digits-baseline"]}
    data = from_steps(tables["steps"], "v1", rewards)
    seen = data.return_N[np.unique(data.episode_N, return_index=True)[1]]
    np.testing.assert_allclose(frame(version, own)["return"], seen, rtol=1e-9, atol=1e-14)


def test_an_episode_without_all_of_its_components_has_no_return(tmp_path):
    tables = synthetic_tables(num_env_seeds=1, behaviours=("baseline",), epsilons=(0.0,))
    steps = tables["steps"]
    index = steps.schema.get_field_index("reward_growth_log2")
    values = [None if step == 2 else value for step, value in zip(steps["step"].to_pylist(), steps[index].to_pylist())]
    tables["steps"] = steps.set_column(index, steps.field(index), pa.array(values, pa.float64()))
    dataset = open_store(tmp_path).dataset("demo")
    dataset.commit(tables)
    version = dataset.seal(matrix_id="m", provenance={})
    assert set(query(version, "SELECT return FROM returns_by_reward")["return"].to_pylist()) == {None}


def test_costs_add_up_per_episode_and_per_cell(made):
    version, tables, _ = made
    costs = pl.from_arrow(tables["costs"]).group_by("episode_id").agg(pl.sum("cpu_s_alone"), pl.sum("cpu_s_shared"))
    both = frame(version, "SELECT * FROM episode_costs").join(costs, on="episode_id")
    assert both.height == tables["episodes"].num_rows
    for found, expected in (("alone_s", "cpu_s_alone"), ("shared_s", "cpu_s_shared")):
        np.testing.assert_allclose(both[found], both[expected])
    cells = both.group_by("environment", "controller", "epsilon").agg(pl.sum("cpu_s_alone"), pl.mean("cpu_s_shared"))
    joined = frame(version, "SELECT * FROM cell_costs").join(cells, on=["environment", "controller", "epsilon"])
    np.testing.assert_allclose(joined["alone_s"], joined["cpu_s_alone"])
    np.testing.assert_allclose(joined["mean_shared_s"], joined["cpu_s_shared"])


def test_progress_sets_the_plan_beside_what_there_is(made):
    version, tables, failed = made
    rows = frame(version, "SELECT * FROM progress")
    cells = {(row["environment"], row["controller"], row["epsilon"]): row for row in rows.iter_rows(named=True)}
    there = pl.from_arrow(tables["episodes"])
    of_failed = there.filter(pl.col("episode_id") == failed).row(0, named=True)
    assert of_failed["controller"] == "baseline"
    baseline = cells["digits-gap", "baseline", 0.0]
    failures = int(of_failed["epsilon"] == 0.0)
    assert (baseline["planned"], baseline["done"], baseline["failed"]) == (5, 3 - failures, failures)
    assert baseline["remaining"] == 2
    unbegun = cells["digits-gap", "aggressive", 0.1]
    assert (unbegun["planned"], unbegun["done"], unbegun["failed"], unbegun["remaining"]) == (2, 0, 0, 2)
    unplanned = cells["digits-baseline", "random", 1.0]
    assert (unplanned["planned"], unplanned["done"], unplanned["remaining"]) == (None, 1, None)
    assert sum(row["failed"] for row in cells.values()) == 1


def test_a_damaged_plan_is_an_integrity_error(tmp_path):
    dataset = open_store(tmp_path).dataset("demo")
    tables = synthetic_tables(num_env_seeds=1)
    dataset.commit(select_episodes(tables, tables["episodes"]["episode_id"].to_pylist()[:1]))
    version = dataset.seal(matrix_id="m", provenance={"planned": [{"environment": 3, "planned": "many"}]})
    with pytest.raises(IntegrityError, match="planned"):
        query(version, "SELECT 1")
