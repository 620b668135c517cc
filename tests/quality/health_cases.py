"""The fault library: which check must catch each planted fault, at which level, and what else may."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import duckdb
import health_faults as faults
from factories import Tables

from esper.leyline.verdict import Level
from quality.checking import measure_all
from quality.measures import WHOLE, Measure
from quality.suites import judge
from quality.thresholds import Threshold, load_thresholds

RULES = ("baseline", "random", "quick-culler", "aggressive", "anti-kasmina", "schedule-sampler", "never-act")


@dataclass(frozen=True)
class Case:
    """A fault, the check that must fire, its level, and the blocking checks that the same fault may set off."""

    plant: Callable[[Tables], Tables]
    check: str
    level: Level = Level.BLOCK
    related: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.plant.__name__.replace("_", " ")


CASES = (
    Case(faults.stale_schema, "schema"),
    Case(faults.column_of_another_type, "schema"),
    Case(faults.missing_final_observation, "structure"),
    Case(faults.missing_step, "structure"),
    Case(faults.truncated_episode, "structure"),
    Case(faults.steps_without_episode, "structure"),
    Case(faults.missing_action, "required_values"),
    Case(faults.action_after_the_end, "required_values"),
    Case(faults.end_marked_early, "episode_ends"),
    Case(faults.short_episode_called_completed, "episode_ends"),
    Case(faults.nan_feature, "finite_values"),
    Case(faults.infinite_loss, "finite_values"),
    Case(faults.accuracy_in_percent, "feature_ranges", Level.WARN),
    Case(faults.illegal_transition, "legal_transitions"),
    Case(faults.action_not_executed, "interventions_have_effect"),
    Case(faults.executed_but_denied, "interventions_have_effect", related=("executed_flags",)),
    Case(faults.other_blueprint_grew, "interventions_have_effect"),
    Case(faults.lineage_never_forks, "interventions_have_effect", related=("paired_control",)),
    Case(faults.refusal_without_a_gate, "executed_flags"),
    Case(faults.alpha_above_one, "alpha_range"),
    Case(faults.held_seed_half_heard, "alpha_range"),
    Case(faults.control_of_another_run, "paired_control"),
    Case(faults.unmasked_invalid_action, "valid_actions"),
    Case(faults.second_spelling_of_wait, "valid_actions"),
    Case(faults.mask_of_another_state, "masks_recompute"),
    Case(faults.wait_masked, "masks_recompute", related=("valid_actions",)),
    Case(faults.bitmap_disagrees, "masks_recompute"),
    Case(faults.germinations_grow_nothing, "germinations_make_seeds", related=("interventions_have_effect",)),
    Case(faults.no_seed_gets_gradient, "seeds_receive_gradient"),
    Case(faults.seed_not_in_forward_pass, "growth_changes_host"),
    Case(faults.rewards_shifted, "reward_recompute"),
    Case(faults.removal_cost_as_reward, "reward_recompute", related=("return_telescopes",)),
    Case(faults.control_missing_from_the_reward, "reward_recompute", related=("return_telescopes",)),
    Case(faults.uncommitted_outcome, "return_telescopes", related=("reward_recompute",)),
    Case(faults.outcome_of_another_run, "return_telescopes"),
    Case(
        faults.nobody_ever_acts,
        "single_action_clusters",
        related=("action_coverage", "action_entropy", "policy_diversity"),
    ),
    Case(faults.nobody_prunes, "action_coverage", related=("policy_diversity",)),
    Case(faults.three_behaviours, "policy_diversity"),
    Case(faults.identical_behaviours, "policy_diversity"),
    Case(faults.softmax_logged_argmax_ran, "propensity_consistent"),
    Case(faults.op_marginals_do_not_sum, "propensity_consistent"),
    Case(faults.exploration_logged_greedy_ran, "propensity_audit"),
    Case(faults.softmax_marginals_though_argmax_ran, "propensity_calibration"),
    Case(faults.doubled_episode, "duplicates"),
    Case(faults.rows_written_twice, "duplicates"),
    Case(faults.leaked_env_seed, "seed_split_leak"),
    Case(faults.training_on_evaluation_replicates, "seed_split_leak"),
    Case(faults.always_the_same_lever, "constant_features", Level.WARN),
)


def connected(tables: Mapping[str, object]) -> duckdb.DuckDBPyConnection:
    """Return a connection with the tables as `steps`, `costs` and `episodes`."""
    connection = duckdb.connect(config={"threads": 1})
    for name, table in tables.items():
        connection.register(f"arrow_{name}", table)
        connection.execute(f"CREATE TABLE {name} AS FROM arrow_{name}")
    return connection


def measured(tables: Tables) -> list[Measure]:
    """Return every measure of some tables."""
    with connected(tables) as connection:
        return measure_all(connection)


def levels_of(measures: Mapping[str, Sequence[Measure]]) -> dict[str, dict[str, Level]]:
    """Return the level of every check on each of several datasets, each of one environment.

    One run of Great Expectations judges all of them: a dataset stands as an environment, and what counts for a whole
    dataset is judged for it alone.
    """
    thresholds = {
        name: threshold.model_copy(update={"scope": "environment"}) for name, threshold in load_thresholds().items()
    }
    kept = [_as_environment(measure, name) for name, part in measures.items() for measure in part if _counts(measure)]
    out: dict[str, dict[str, Level]] = {name: {} for name in measures}
    for result in judge(kept, thresholds, None):
        if out[result.environment].get(result.name) is not Level.BLOCK:
            out[result.environment][result.name] = result.level
    return out


def _counts(measure: Measure) -> bool:
    threshold: Threshold = load_thresholds()[measure.check]
    return (measure.environment == WHOLE) == (threshold.scope == "dataset")


def _as_environment(measure: Measure, name: str) -> Measure:
    return Measure(check=measure.check, environment=name, value=measure.value, message=measure.message)


def blocked(levels: Mapping[str, Level]) -> set[str]:
    """Return the checks that block."""
    return {name for name, level in levels.items() if level is Level.BLOCK}
