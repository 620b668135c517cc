from __future__ import annotations

import pytest
import stand_in
import tiny

from esper.leyline.errors import SpecError, StoreError, UnknownNameError
from esper.leyline.identity import root_host_key
from esper.tolaria.workers import cohort_engine
from flows.datagen import DatagenRequest, generate, run_datagen
from flows.orchestration import LocalOrchestrator
from flows.planning import Selection, computed_epochs, plan_matrix, remaining
from flows.preview import preview


@pytest.fixture
def library(tmp_path, monkeypatch):
    tiny.write_library(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _generate(folder, engine=cohort_engine, **options):
    matrix, plans = plan_matrix("tiny")
    with tiny.context(folder, engine, workers=options.pop("workers", 0)) as context:
        return generate(context, matrix, plans, **options)


def _rows(version, *columns):
    return version.table("episodes", columns=list(columns)).to_pylist()


def test_every_planned_episode_is_stored_once_and_sealed(library):
    generated = _generate(library)
    _, plans = plan_matrix("tiny")
    found = [row["episode_id"] for row in _rows(generated.version, "episode_id")]
    assert sorted(found) == sorted(name for plan in plans for name in plan.episode_ids())
    assert (generated.sealed, generated.version.ref) == (True, "tiny@1")


def test_cohorts_run_replicate_by_replicate_so_that_an_interruption_leaves_something_of_every_environment(library):
    root = library / "datasets"
    (root / "environments" / "other.toml").write_text(tiny.ENVIRONMENT.format(name="other", horizon=5))
    matrix = (root / "matrices" / "tiny.toml").read_text()
    cell = matrix[matrix.index("[[cells]]") :].replace('environment = "tiny"', 'environment = "other"')
    (root / "matrices" / "tiny.toml").write_text(matrix + cell)
    ran = []

    def engine(plan):
        ran.append((plan.replicate, plan.environment.name))
        return stand_in.synthetic(plan)

    _generate(library, engine=engine)
    assert ran == [(replicate, name) for replicate in range(3) for name in ("tiny", "other")]


def test_the_same_command_again_runs_nothing_and_seals_nothing(library):
    first, again = _generate(library), _generate(library, engine=stand_in.raises_on_replicate_1)
    assert (again.new_episodes, again.sealed, again.version.ref) == (0, False, first.version.ref)


def test_later_commits_of_other_episodes_do_not_make_the_same_command_seal_again(library):
    first = _generate(library)
    other = stand_in.synthetic(stand_in.plans(1)[0])
    with tiny.context(library, stand_in.synthetic) as context:
        context.commit(other)
    assert _generate(library).version.ref == first.version.ref


def test_measured_epochs_lie_between_the_trunks_and_each_episode_alone(library):
    generated = _generate(library)
    estimate = preview(DatagenRequest(matrix="tiny", store=str(library / "store"))).estimate
    assert estimate.episodes == generated.new_episodes == 12
    assert estimate.least_epochs <= generated.computed_epochs <= estimate.alone_epochs == generated.alone_epochs
    assert estimate.measured_ratio == pytest.approx(generated.ratio)


def test_the_trunk_counts_as_computed_even_if_no_episode_stayed_on_it():
    plan = stand_in.plans(1, horizon=4)[0]
    steps = stand_in.synthetic(plan)["steps"]
    trunk = root_host_key(plan.environment.spec_id, plan.env_seed, "host")
    off_trunk = steps.filter([key != trunk for key in steps["host_key"].to_pylist()])
    pairs = set(zip(off_trunk["host_key"].to_pylist(), off_trunk["step"].to_pylist()))
    assert computed_epochs(plan, off_trunk) == len({pair for pair in pairs if pair[1] >= 1}) + 4


def test_a_cohort_that_fails_twice_is_stored_as_failed_and_the_rest_goes_on(library):
    generated = _generate(library, engine=_fails_replicate_1)
    assert (generated.new_episodes, generated.failed_episodes) == (8, 4)
    failed = [row for row in _rows(generated.version, "outcome", "error", "replicate") if row["outcome"] == "failed"]
    assert {row["replicate"] for row in failed} == {1}
    assert {row["error"] for row in failed} == {"ZeroDivisionError: made up"}
    (events,) = (library / "store/tiny/runs/r1").glob("events-*.jsonl")
    assert "cohort.failed" in events.read_text()


def _fails_replicate_1(plan):
    if plan.replicate == 1:
        raise ZeroDivisionError("made up")
    return cohort_engine(plan)


def _fails_once_on_replicate_1(plan):
    return cohort_engine(plan) if stand_in.raises_once(plan) is not None else {}


def test_a_cohort_that_fails_once_is_tried_again(library, monkeypatch):
    monkeypatch.setattr(stand_in, "synthetic", lambda plan: {})
    generated = _generate(library, engine=_fails_once_on_replicate_1)
    assert (generated.new_episodes, generated.failed_episodes) == (12, 0)


def test_failed_episodes_stay_failed_until_asked_for_and_then_the_digest_is_that_of_a_clean_run(library, tmp_path):
    _generate(library, engine=_fails_replicate_1)
    assert _generate(library).new_episodes == 0
    retried = _generate(library, retry_failed=True)
    assert (retried.new_episodes, retried.version.number) == (4, 2)
    clean = _generate(tmp_path / "other")
    assert retried.version.manifest.digest == clean.version.manifest.digest


def test_the_digest_is_the_same_in_process_and_on_two_workers(library):
    here = _generate(library / "one")
    there = _generate(library / "two", workers=2)
    assert here.version.manifest.digest == there.version.manifest.digest


def test_the_manifest_says_where_the_data_comes_from(library):
    said = _generate(library).version.manifest.provenance
    assert said["host_data"][0]["licence"] == "CC BY 4.0"
    assert said["rewards"]["tiny"]["rent_points"] == 3.0
    assert said["environments"]["tiny"]["horizon"] == 5
    assert said["machine"]["cores"] >= 1
    assert said["packages"]["torch"]


def test_remaining_leaves_out_known_episodes_and_finished_cohorts():
    plans = stand_in.plans(2)
    first, second = (plan.episode_ids() for plan in plans)
    rest = remaining(plans, {*first, second[0]})
    assert [plan.episode_ids() for plan in rest] == [second[1:]]


def test_a_selection_cuts_behaviours_epsilons_and_horizon(library):
    chosen = Selection(behaviours=("baseline",), epsilons=(0.5,), max_epochs=2)
    _, plans = plan_matrix("tiny", chosen)
    assert [(len(plan.episodes), plan.environment.horizon) for plan in plans] == [(1, 2)] * 3


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(environments=("tinny",)), "did you mean 'tiny'"),
        (Selection(behaviours=("basline",)), "did you mean 'baseline'"),
    ],
)
def test_an_unknown_name_in_a_selection_names_the_nearest(library, selection, message):
    with pytest.raises(UnknownNameError, match=message):
        plan_matrix("tiny", selection)


def test_a_selection_that_leaves_nothing_is_a_usage_error(library):
    with pytest.raises(SpecError, match="nothing of matrix 'tiny' is left"):
        plan_matrix("tiny", Selection(behaviours=("aggressive",)))


def test_a_store_in_the_way_of_a_file_is_one_clear_error(library):
    (library / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        run_datagen(DatagenRequest(matrix="tiny", store=str(library / "file"), workers=0), LocalOrchestrator(1))
