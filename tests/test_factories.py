from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from factories import synthetic_tables

from esper.leyline.actions import is_valid, unpack_mask
from esper.leyline.observations import FEATURE_COLUMNS
from esper.leyline.schema import ACTION_FIELDS, SCHEMAS

BEHAVIOURS = ("baseline", "random", "anti-kasmina", "never-act", "schedule-sampler")


@pytest.fixture(scope="module")
def tables():
    return synthetic_tables(horizon=12, behaviours=BEHAVIOURS, refusal_rate=0.2)


@pytest.fixture(scope="module")
def steps(tables):
    return pl.from_arrow(tables["steps"])


def test_tables_have_the_schema_without_the_commit_columns(tables):
    for name, schema in SCHEMAS.items():
        assert tables[name].schema.names == [n for n in schema.names if n not in ("commit_id", "attempt")]
        for field in tables[name].schema:
            assert field.type == schema.field(field.name).type
            assert field.nullable or tables[name][field.name].null_count == 0, field.name


def test_every_action_is_in_its_mask(steps):
    acted = steps.filter(~pl.col("is_last"))
    masks = unpack_mask(np.array([np.frombuffer(row, np.uint8) for row in acted["tree_mask"]]))
    ops = acted["op"].replace_strict({"WAIT": 0, "GERMINATE": 1, "ADVANCE": 2, "FOSSILIZE": 3, "PRUNE": 4})
    actions = np.column_stack([ops, *(acted[name] for name in ACTION_FIELDS)])
    assert is_valid(actions, masks).all()


def test_equal_state_ids_have_equal_observations(steps):
    distinct = steps.select("env_seed", "state_id", *FEATURE_COLUMNS, "tree_mask").unique()
    assert distinct.height == steps.select("env_seed", "state_id").unique().height < steps.height


def test_equal_host_keys_have_equal_accuracies(steps):
    distinct = steps.select("env_seed", "host_key", "step", "val_accuracy").unique()
    assert distinct.height == steps.select("env_seed", "host_key", "step").unique().height < steps.height


def test_the_return_telescopes_to_the_final_paired_gain(tables, steps):
    episodes = pl.from_arrow(tables["episodes"])
    total = steps.group_by("episode_id").agg(pl.col("reward_accuracy_points").sum())
    both = episodes.join(total, on="episode_id")
    gain = 100 * (both["final_val_accuracy"] - both["control_final_val_accuracy"])
    assert np.allclose(gain, both["reward_accuracy_points"], atol=1e-9)


def test_never_act_is_its_own_control(tables):
    rows = pl.from_arrow(tables["episodes"]).filter(pl.col("controller") == "never-act")
    assert (rows["final_val_accuracy"] == rows["control_final_val_accuracy"]).all()
    assert (rows["final_test_accuracy"] == rows["control_final_test_accuracy"]).all()


def test_seeds_are_committed_pruned_and_refused(steps, tables):
    done = set(steps.filter(pl.col("executed"))["op"])
    assert {"GERMINATE", "ADVANCE", "FOSSILIZE", "PRUNE"} <= done
    assert set(steps["refused_by"].drop_nulls()) == {"G2", "G5"}
    assert pl.from_arrow(tables["episodes"])["num_fossils"].max() >= 1


def test_the_same_arguments_make_the_same_tables():
    first, second = synthetic_tables(num_env_seeds=1), synthetic_tables(num_env_seeds=1)
    assert all(first[name].equals(second[name]) for name in first)


def test_evaluation_episodes_use_evaluation_replicates():
    rows = synthetic_tables(num_env_seeds=1, role="evaluation")["episodes"]
    assert set(rows["replicate"].to_pylist()) == {200_000}
