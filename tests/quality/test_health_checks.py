from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import duckdb
import health_faults as faults
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from factories import Tables, concat_tables, select_episodes, synthetic_tables
from health_cases import RULES, blocked, connected, levels_of, measured

from esper.leyline.verdict import CheckResult, Level, Use
from quality import drift, values
from quality.checking import DOCS_INDEX, examine, measure_all
from quality.measures import Measure
from quality.value import trunk_id
from quality.working import prepare


@pytest.fixture(scope="module")
def good() -> Tables:
    return synthetic_tables(num_env_seeds=4, horizon=12, behaviours=RULES, refusal_rate=0.1)


@pytest.fixture(scope="module")
def good_measures(good: Tables) -> list[Measure]:
    return measured(good)


def results_of(tables: Tables, docs_dir: Path | None = None) -> tuple[CheckResult, ...]:
    with connected(tables) as connection:
        return examine(connection, docs_dir=docs_dir)


def names_at(results: tuple[CheckResult, ...], level: Level) -> set[str]:
    return {result.name for result in results if result.level is level}


def value_of(measures: list[Measure], check: str, environment: str = "digits-gap") -> Measure:
    return next(measure for measure in measures if (measure.check, measure.environment) == (check, environment))


def test_good_data_blocks_nothing_and_its_docs_are_written(good: Tables, tmp_path: Path) -> None:
    results = results_of(good, tmp_path / "docs")
    assert names_at(results, Level.BLOCK) == set()
    assert names_at(results, Level.WARN) <= {"identical_behaviours", "policy_diversity", "constant_features"}
    index = (tmp_path / "docs" / DOCS_INDEX).read_text()
    for suite in ("structure", "dynamics", "effect", "value", "coverage", "behaviour", "leakage"):
        assert suite in index


def _good_of_seeds(seeds: range) -> Mapping[str, Tables]:
    return {
        str(seed): synthetic_tables(num_env_seeds=4, horizon=12, behaviours=RULES, seed=seed, first_replicate=4 * seed)
        for seed in seeds
    }


def test_three_good_datasets_of_other_seeds_block_nothing() -> None:
    levels = levels_of({name: measured(tables) for name, tables in _good_of_seeds(range(1, 4)).items()})
    assert not any(blocked(found) for found in levels.values()), levels


@pytest.mark.slow
def test_twenty_good_datasets_of_other_seeds_block_nothing() -> None:
    levels = levels_of({name: measured(tables) for name, tables in _good_of_seeds(range(10, 30)).items()})
    assert len(levels) == 20
    assert not any(blocked(found) for found in levels.values()), levels


def test_two_environments_are_judged_apart_and_block_nothing() -> None:
    gap = synthetic_tables(num_env_seeds=3, horizon=10, behaviours=RULES, seed=1)
    baseline = synthetic_tables(environment="digits-baseline", num_env_seeds=2, horizon=10, seed=1)
    results = results_of(concat_tables(gap, baseline))
    assert names_at(results, Level.BLOCK) == set()
    assert {result.environment for result in results} == {"all", "digits-gap", "digits-baseline"}


def test_a_propensity_fault_blocks_evaluation_and_warns_the_other_uses(good: Tables) -> None:
    results = results_of(faults.op_marginals_do_not_sum(dict(good)))
    found = {(result.level, result.uses) for result in results if result.name == "propensity_consistent"}
    assert found == {
        (Level.BLOCK, (Use.OFF_POLICY_EVALUATION,)),
        (Level.WARN, (Use.IMITATION, Use.OFFLINE_RL)),
    }
    fired = next(result for result in results if result.level is Level.BLOCK)
    assert fired.message
    assert fired.remedy


def test_a_branch_is_measured_against_its_parent(good: Tables, good_measures: list[Measure]) -> None:
    episodes = good["episodes"].to_pylist()
    seed = episodes[0]["env_seed"]
    parent = next(e for e in episodes if e["env_seed"] == seed and e["controller"] == "never-act")
    child = max((e for e in episodes if e["env_seed"] == seed), key=lambda e: e["final_val_accuracy"])
    ids = [episode["episode_id"] for episode in episodes]
    branched = faults.edit(
        good,
        "episodes",
        "branch_parent",
        lambda old: [parent["episode_id"] if i == child["episode_id"] else None for i in ids],
    )
    found = value_of(measured(branched), "branch_advantage")
    assert found.value == pytest.approx(100 * (child["final_val_accuracy"] - parent["final_val_accuracy"]))
    assert value_of(good_measures, "branch_advantage").value is None


def test_a_branch_of_a_trunk_that_is_not_stored_is_measured_against_the_control(good: Tables) -> None:
    child = max(good["episodes"].to_pylist(), key=lambda e: e["final_val_accuracy"])
    ids = good["episodes"]["episode_id"].to_pylist()
    trunk = trunk_id(child["environment_id"], child["env_seed"])
    branched = faults.edit(
        good, "episodes", "branch_parent", lambda old: [trunk if name == child["episode_id"] else None for name in ids]
    )
    kept = [name for name in ids if name != trunk]
    assert len(kept) == len(ids) - 1
    branched = select_episodes(branched, kept)
    found = value_of(measured(branched), "branch_advantage")
    assert found.value == pytest.approx(100 * (child["final_val_accuracy"] - child["control_final_val_accuracy"]))


def test_every_value_on_offer_is_counted_with_its_env_seeds(good: Tables) -> None:
    with connected(good) as connection:
        prepare(connection)
        counts = values.value_counts(connection)
    heads = {count.head for count in counts}
    assert heads == {
        *("op", "slot of GERMINATE", "slot of ADVANCE", "slot of FOSSILIZE", "slot of PRUNE"),
        *("blueprint", "blend", "tempo", "dwell", "isolation", "seed_lr"),
    }
    steps = good["steps"]
    unforced = steps.filter(pc.and_(pc.invert(steps["forced"]), pc.invert(steps["is_last"])))
    born = unforced.filter(pc.equal(unforced["op"], "GERMINATE"))
    by_blueprint = [count for count in counts if count.head == "blueprint"]
    assert sum(count.taken for count in by_blueprint) == born.num_rows
    light = next(count for count in by_blueprint if count.value == "conv_light")
    grew = born.filter(pc.equal(born["action_blueprint"], 6))
    assert light.env_seeds == len(set(grew["env_seed"].to_pylist()))
    assert all(count.taken <= count.valid for count in counts)


def test_the_same_data_has_not_drifted_and_other_losses_have(good: Tables) -> None:
    def shift(old: list[object]) -> list[object]:
        return [None if value is None else 2 * float(str(value)) for value in old]

    worse = faults.edit(good, "steps", "val_loss", shift)
    with connected(good) as now, connected(good) as same, connected(worse) as other:
        names = ["digits-gap"]
        assert value_of(drift.measure(now, names, same), "feature_drift").value == pytest.approx(0)
        found = value_of(drift.measure(now, names, other), "feature_drift")
        assert value_of(drift.measure(now, names, other), "action_drift").value == pytest.approx(0)
        assert value_of(drift.measure(now, names, None), "feature_drift").value is None
    assert found.value is not None
    assert found.value > 0.25
    assert "val_loss" in found.message


def test_the_uniform_policy_keeps_every_one_of_its_own_episodes() -> None:
    tables = synthetic_tables(num_env_seeds=55, horizon=3, behaviours=("random",))
    found = value_of(measured(tables), "effective_sample_size")
    assert found.value == 3
    assert "of 55 episodes (55 env_seeds): 55 (55.0) after 1" in found.message


def test_the_normalised_entropy_of_a_uniform_choice_is_one_and_of_a_rule_zero(good: Tables) -> None:
    tables = synthetic_tables(num_env_seeds=20, horizon=6, behaviours=("random",))
    uniform = value_of(measured(tables), "normalised_entropy", "all").value
    assert uniform is not None
    assert 0.9 < uniform <= 1
    assert value_of(measured(faults.nobody_ever_acts(dict(good))), "normalised_entropy", "all").value == 0


def test_measures_do_not_depend_on_the_order_of_the_rows(good: Tables, good_measures: list[Measure]) -> None:
    order = np.random.default_rng(0).permutation(good["steps"].num_rows)
    shuffled = {**good, "steps": good["steps"].take(pa.array(order))}
    found, expected = measured(shuffled), good_measures
    assert [(m.check, m.environment) for m in found] == [(m.check, m.environment) for m in expected]
    for one, other in zip(found, expected):
        assert one.value == (None if other.value is None else pytest.approx(other.value, rel=1e-9, abs=1e-12))


def test_a_missing_column_is_the_only_thing_that_is_reported(good: Tables) -> None:
    with duckdb.connect() as connection:
        for name, table in faults.stale_schema(dict(good)).items():
            connection.register(name, table)
        found = measure_all(connection)
    assert [measure.check for measure in found] == ["schema"]
    assert "s0_val_loss_drop is missing" in found[0].message
