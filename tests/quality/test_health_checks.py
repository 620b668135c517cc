from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import health_faults as faults
import pytest
from factories import Tables, concat_tables, synthetic_tables

from esper.leyline.verdict import CheckResult, Level, Use
from quality.checking import DOCS_INDEX, examine

RULES = ("baseline", "random", "quick-culler", "aggressive", "anti-kasmina", "schedule-sampler", "never-act")


@pytest.fixture(scope="module")
def good() -> Tables:
    return synthetic_tables(num_env_seeds=4, horizon=12, behaviours=RULES, refusal_rate=0.1)


def results_of(tables: Tables, docs_dir: Path | None = None) -> tuple[CheckResult, ...]:
    connection = duckdb.connect()
    for name, table in tables.items():
        connection.register(name, table)
    return examine(connection, docs_dir=docs_dir)


def names_at(results: tuple[CheckResult, ...], level: Level) -> set[str]:
    return {result.name for result in results if result.level is level}


def test_good_data_blocks_nothing_and_its_docs_are_written(good: Tables, tmp_path: Path) -> None:
    results = results_of(good, tmp_path / "docs")
    assert names_at(results, Level.BLOCK) == set()
    assert names_at(results, Level.WARN) <= {"identical_behaviours", "policy_diversity", "constant_features"}
    index = (tmp_path / "docs" / DOCS_INDEX).read_text()
    for suite in ("structure", "dynamics", "value", "coverage", "behaviour", "leakage"):
        assert suite in index


@pytest.mark.parametrize("seed", [1, 2])
def test_good_data_of_other_seeds_and_two_environments_blocks_nothing(seed: int) -> None:
    gap = synthetic_tables(num_env_seeds=3, horizon=10, behaviours=RULES, seed=seed)
    baseline = synthetic_tables(environment="digits-baseline", num_env_seeds=2, horizon=10, seed=seed)
    results = results_of(concat_tables(gap, baseline))
    assert names_at(results, Level.BLOCK) == set()
    assert {result.environment for result in results} == {"all", "digits-gap", "digits-baseline"}


CAUGHT: list[tuple[Callable[[Tables], Tables], str, set[str]]] = [
    (faults.action_not_executed, "interventions_have_effect", set()),
    (faults.executed_but_denied, "interventions_have_effect", set()),
    (faults.other_blueprint_grew, "interventions_have_effect", set()),
    (faults.lineage_never_forks, "interventions_have_effect", {"paired_control"}),
    (faults.seed_not_in_forward_pass, "growth_changes_host", set()),
    (faults.control_of_another_run, "paired_control", set()),
    (faults.rewards_shifted, "reward_recompute", set()),
    (faults.removal_cost_as_reward, "reward_recompute", {"return_telescopes"}),
    (faults.outcome_of_another_run, "return_telescopes", set()),
    (faults.softmax_logged_argmax_ran, "propensity_consistent", set()),
    (faults.exploration_logged_greedy_ran, "propensity_audit", set()),
    (faults.op_marginals_do_not_sum, "propensity_consistent", set()),
    (faults.unmasked_invalid_action, "valid_actions", set()),
    (faults.second_spelling_of_wait, "valid_actions", set()),
    (faults.mask_of_another_state, "masks_recompute", {"propensity_consistent"}),
    (faults.bitmap_disagrees, "masks_recompute", set()),
    (faults.illegal_transition, "legal_transitions", set()),
    (faults.nan_feature, "finite_values", set()),
    (faults.missing_action, "required_values", set()),
    (faults.missing_final_observation, "structure", set()),
    (faults.missing_step, "structure", set()),
    (faults.steps_without_episode, "structure", set()),
    (faults.doubled_episode, "duplicates", set()),
    (faults.leaked_env_seed, "seed_split_leak", set()),
    (faults.training_on_evaluation_replicates, "seed_split_leak", set()),
    (faults.identical_behaviours, "policy_diversity", set()),
]


@pytest.mark.parametrize(("plant", "check", "related"), CAUGHT, ids=[plant.__name__ for plant, _, _ in CAUGHT])
def test_a_planted_fault_is_blocked_by_its_check_and_by_no_unrelated_one(
    good: Tables, plant: Callable[[Tables], Tables], check: str, related: set[str]
) -> None:
    results = results_of(plant(dict(good)))
    blocked = names_at(results, Level.BLOCK)
    assert check in blocked
    assert blocked <= {check} | related
    fired = next(result for result in results if result.name == check and result.level is Level.BLOCK)
    assert fired.message
    assert fired.remedy


def test_never_acting_alone_is_blocked_by_coverage_and_diversity_alone() -> None:
    results = results_of(synthetic_tables(num_env_seeds=3, behaviours=("never-act",)))
    assert names_at(results, Level.BLOCK) == {
        "action_coverage",
        "action_entropy",
        "single_action_clusters",
        "policy_diversity",
    }


def test_a_propensity_fault_blocks_evaluation_and_warns_the_other_uses(good: Tables) -> None:
    results = results_of(faults.op_marginals_do_not_sum(dict(good)))
    found = {(result.level, result.uses) for result in results if result.name == "propensity_consistent"}
    assert found == {
        (Level.BLOCK, (Use.OFF_POLICY_EVALUATION,)),
        (Level.WARN, (Use.IMITATION, Use.OFFLINE_RL)),
    }


def test_a_feature_that_was_never_measured_warns(good: Tables) -> None:
    results = results_of(faults.always_the_same_lever(dict(good)))
    fired = next(result for result in results if result.name == "constant_features" and result.environment == "all")
    assert fired.level is Level.WARN
    assert "weight_norm" in fired.message
