"""The remedy: what is proposed for which weakness, within the budget, and as a matrix that data generation takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from factories import Tables, synthetic_tables

from esper.karn.store import Version, open_store
from esper.leyline.actions import Op, slot_slice, unpack_mask
from esper.leyline.errors import HealthError
from esper.leyline.library import load_reward_of
from esper.leyline.matrix import MatrixSpec
from esper.leyline.plans import expand
from esper.leyline.verdict import CheckResult, Level, Verdict
from quality.suggest import Suggestion, suggest, table_lines, to_toml
from quality.suggest_branches import choose_action
from quality.suggest_data import ActionCounts, Arm
from quality.suggest_effects import found_by_chance

RULES = ("baseline", "conservative")


def sealed(folder: Path, **changes: object) -> Version:
    fields: dict[str, object] = {"num_env_seeds": 3, "behaviours": RULES, "horizon": 20, "epsilons": (0.0,), **changes}
    return stored(folder, synthetic_tables(**fields))


def stored(folder: Path, tables: Tables) -> Version:
    dataset = open_store(folder).dataset("thin")
    dataset.commit(tables)
    return dataset.seal(
        matrix_id="m", provenance={"rewards": {"digits-gap": load_reward_of("digits-gap").model_dump(mode="json")}}
    )


def result(name: str, value: float, level: Level, limit: float, environment: str = "all") -> CheckResult:
    return CheckResult(
        name=name, environment=environment, level=level, value=value, warn_threshold=limit, message="made up"
    )


FAILING = (
    result("action_entropy", 0.5, Level.BLOCK, 1.5),
    result("policy_diversity", 2.0, Level.BLOCK, 8.0),
    result("value_coverage", 0.5, Level.BLOCK, 0.95),
)


def verdict_of(version: Version, *checks: CheckResult) -> Verdict:
    return Verdict(
        dataset=version.name,
        version=version.number,
        digest=version.manifest.digest,
        checked_at="2026-11-20T11:00:00+00:00",
        checks=checks or FAILING,
    )


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return sealed(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def suggestion(version: Version) -> Suggestion:
    return suggest(version, verdict_of(version), max_episodes=20)


def test_the_toml_is_the_matrix(suggestion: Suggestion, tmp_path: Path) -> None:
    path = tmp_path / "remedy.toml"
    path.write_text(to_toml(suggestion))
    assert MatrixSpec.from_toml(path) == suggestion.matrix
    assert "# esper datagen --matrix THIS_FILE --dataset thin" in path.read_text()


def test_the_budget_counts_what_the_dataset_does_not_have(version: Version, suggestion: Suggestion) -> None:
    held = set(version.table("episodes", columns=["episode_id"])["episode_id"].to_pylist())
    planned = [name for plan in expand(suggestion.matrix) for name in plan.planned_ids()]
    assert len(set(planned)) == len(planned)
    assert len(set(planned) - held) == suggestion.episodes <= 20
    assert suggestion.branches == len(suggestion.matrix.branches) <= suggestion.episodes


def test_the_failing_checks_are_expected_to_rise_beyond_now(suggestion: Suggestion) -> None:
    rows = {row.check: row for row in suggestion.table}
    for check in FAILING:
        assert rows[check.name].level is Level.BLOCK
        assert rows[check.name].expected > rows[check.name].now
    assert [row.level for row in suggestion.table][:3] == [Level.BLOCK] * 3
    assert len(table_lines(suggestion)) == len(suggestion.table) + 1


def test_missing_exploration_is_met_by_behaviours_that_the_dataset_does_not_have(suggestion: Suggestion) -> None:
    (cell,) = suggestion.matrix.cells
    assert cell.explorers or not set(cell.behaviours) <= set(RULES)


def test_branches_leave_stored_episodes_by_ops_that_were_never_taken_there(version: Version) -> None:
    values = result("value_coverage", 0.5, Level.BLOCK, 0.95)
    suggestion = suggest(version, verdict_of(version, values), max_episodes=12)
    assert suggestion.branches > 0
    steps = version.table("steps").to_pylist()
    held = set(version.table("episodes", columns=["episode_id"])["episode_id"].to_pylist())
    for plan in expand(suggestion.matrix):
        for branch in plan.branches:
            parent = plan.identity(branch.parent).episode_id
            assert parent in held
            here = next(row for row in steps if row["episode_id"] == parent and row["step"] == branch.step)
            op = Op(branch.forced[0][0])
            assert here["valid_ops"] & (1 << op)
            assert not here["forced"]
            same = [row["op"] for row in steps if row["state_id"] == here["state_id"]]
            assert op.name not in same


def test_no_more_episodes_leave_the_plan_than_were_asked_for(version: Version) -> None:
    assert suggest(version, verdict_of(version), max_episodes=1).episodes == 1


def test_the_same_version_and_verdict_give_the_same_suggestion(version: Version, suggestion: Suggestion) -> None:
    assert suggest(version, verdict_of(version), max_episodes=20) == suggestion


def test_behaviours_that_coincide_are_sent_to_new_env_seeds(tmp_path: Path) -> None:
    tables = synthetic_tables(num_env_seeds=2, behaviours=("baseline", "periodic"), horizon=20, epsilons=(0.0,))
    episodes = tables["episodes"]
    place = episodes.schema.get_field_index("history_id")
    same = episodes.set_column(place, episodes.schema.field(place), pc.cast(episodes["env_seed"], "string"))
    version = stored(tmp_path, {**tables, "episodes": same})
    twins = result("identical_behaviours", 1.0, Level.WARN, 0.0, environment="digits-gap")
    suggestion = suggest(version, verdict_of(version, twins))
    (cell,) = suggestion.matrix.cells
    assert {"baseline", "periodic"} <= set(cell.behaviours)
    assert cell.first_replicate == 2
    (row,) = (row for row in suggestion.table if row.check == "identical_behaviours")
    assert row.expected < 1.0


def test_checks_that_more_data_cannot_mend_are_named(version: Version) -> None:
    broken = result("reward_recompute", 12.0, Level.BLOCK, 0.0, environment="digits-gap")
    suggestion = suggest(version, verdict_of(version, *FAILING, broken), max_episodes=4)
    assert suggestion.notes == ("more data does not mend reward_recompute; see its remedy",)
    assert "# note: more data does not mend reward_recompute" in to_toml(suggestion)


def test_the_verdict_of_another_version_is_refused(version: Version) -> None:
    other = verdict_of(version).model_copy(update={"digest": "0" * 64})
    with pytest.raises(HealthError, match="esper health thin@1"):
        suggest(version, other)


def test_an_environment_that_the_library_has_otherwise_cannot_be_extended(tmp_path: Path) -> None:
    version = sealed(tmp_path, horizon=6)
    with pytest.raises(HealthError, match="another one than the dataset's"):
        suggest(version, verdict_of(version))


def test_a_forced_action_gets_what_was_taken_least_and_can_still_end() -> None:
    counts = ActionCounts.empty()
    for blueprint in range(8):
        for tempo in range(4):
            counts.add([int(Op.GERMINATE), 0, blueprint, 0, tempo, 0, 0, 0], 5)
    counts.blueprint_tempos[3, 0] = 0
    mask = np.ones(185, dtype=bool)
    mask[slot_slice(Op.GERMINATE)] = [True, True, False, False, False, False]
    action = choose_action(Op.GERMINATE, mask, counts, left=7)
    assert action.tolist()[:3] == [Op.GERMINATE, 1, 3]
    assert (action[4], action[5]) == (0, 1)  # tempo 3 after a dwell of 2: all that seven epochs allow
    assert action.tolist()[6:] == [1, 1]
    assert choose_action(Op.WAIT, mask, counts, left=7).tolist() == [0] * 8


def test_a_mask_is_kept_as_it_was_stored(version: Version) -> None:
    row = version.table("steps", columns=["tree_mask", "valid_ops"]).slice(0, 1).to_pylist()[0]
    mask = unpack_mask(np.frombuffer(row["tree_mask"], dtype=np.uint8)[None])[0]
    assert sum(1 << op for op in Op if mask[op]) == row["valid_ops"]


def test_uniform_draws_find_all_of_few_values_and_none_without_a_draw() -> None:
    unseen = np.array([True, True, False])
    assert found_by_chance(unseen, 3, 0) == 0
    assert found_by_chance(unseen, 3, 1) == pytest.approx(2 / 3)
    assert found_by_chance(unseen, 3, 1000) == pytest.approx(2)


def test_an_arm_that_explores_more_is_mixed_with_the_uniform_policy() -> None:
    from quality.suggest_data import Findings
    from quality.suggest_effects import expected_arm

    greedy = Arm(
        valid=np.array([10.0, 10, 0, 0, 0]),
        taken=np.array([10.0, 0, 0, 0, 0]),
        uniform=np.array([5.0, 5, 0, 0, 0]),
        states=10.0,
        episodes=4,
    )
    findings = Findings.__new__(Findings)
    object.__setattr__(findings, "arms", {("here", "baseline", 0.0): greedy})
    assert expected_arm(findings, "here", "baseline", 0.2).taken.tolist() == [9, 1, 0, 0, 0]
    assert expected_arm(findings, "here", "random", 1.0).taken.tolist() == [5, 5, 0, 0, 0]
    assert expected_arm(findings, "here", "baseline", 0.0) is greedy
