"""`esper datagen` as a service: what is planned, what it takes, how far it is, and what becomes of what fails."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import stand_in
import tiny
from rich.console import Console

from esper.cli.main import main
from esper.karn.progress_table import PROGRESS, newest_plan, progress, progress_line, summed
from esper.karn.store import open_store
from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.library import load_environment
from esper.tolaria.cost import host_costs
from esper.tolaria.memory import task_shape
from esper.tolaria.workers import WorkerDiedError, WorkerError
from flows import preview as previews
from flows import progress as lines
from flows.datagen import DatagenRequest, generate
from flows.failures import MAX_TRIES, Tries
from flows.host_operations import batch_operations
from flows.planning import Selection, plan_matrix
from flows.preview import preview
from flows.progress import BarReporter, PlainReporter, table_of_progress

HERE = ["--store", "store", "--no-prefect", "--workers", "0"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    tiny.write_library(tmp_path, horizon=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _generate(folder, engine=stand_in.synthetic, selection=None, workers=0, **options):
    matrix, plans = plan_matrix("tiny", selection)
    with tiny.context(folder, engine, workers=workers) as context:
        return generate(context, matrix, plans, **options)


# ---- what is planned


def test_the_full_matrix_is_thirteen_environments_of_31_by_ten():
    _, plans = plan_matrix("full")
    assert len({plan.environment.name for plan in plans}) == 13
    assert {plan.num_planned for plan in plans} == {31}
    assert sum(plan.num_planned for plan in plans) == 13 * 31 * 10
    assert {plan.environment.horizon for plan in plans} == {25}


def test_episodes_per_combo_are_the_replicates_of_every_cell(library):
    _, plans = plan_matrix("tiny", Selection(episodes_per_combo=5))
    assert [plan.replicate for plan in plans] == [0, 1, 2, 3, 4]
    text = (library / "datasets/matrices/tiny.toml").read_text().replace("replicates", "repetitions = 2\nreplicates")
    (library / "datasets/matrices/twice.toml").write_text(text.replace('"tiny"\n[[', '"twice"\n[[', 1))
    assert len(plan_matrix("twice", Selection(episodes_per_combo=4))[1]) == 2
    with pytest.raises(SpecError, match="a multiple of 2"):
        plan_matrix("twice", Selection(episodes_per_combo=3))


def test_what_a_selection_of_behaviours_may_name_has_explorers_and_trials_in_it():
    with pytest.raises(UnknownNameError, match="did you mean 'schedule-sampler'"):
        plan_matrix("demo", Selection(behaviours=("schedule-sampl",)))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--matrix", "tiny", "--output-dir", "a"], "one option by two names"),
        (["--matrix", "tiny", "--batch-size", "4"], "--pool"),
        (["--matrix", "tiny", "--skeleton", "--pool", "cpu"], "trains nothing"),
        (["--matrix", "tiny", "--memory"], "--dry-run"),
        (["--matrix", "tiny", "--episodes-per-combo", "0"], "episodes_per_combo"),
        (["--health-check", "--matrix", "tiny", "--no-health"], "and --no-health is about a run"),
        (["--health-check", "--matrix", "tiny", "--retry-failed"], "--retry-failed"),
        (["--health-check", "--matrix", "tiny"], "--workers"),
        (["--matrix", "tiny", "--skeleton", "--max-lineages", "3"], "--max-lineages"),
        (["--matrix", "tiny", "--pool", "cpu"], "leave --no-prefect out"),
        ([], "expected: --matrix"),
    ],
)
def test_options_that_do_not_fit_together_are_usage_errors(library, options, hint, capsys):
    assert main(["datagen", *options, *HERE]) == 2
    assert hint in capsys.readouterr().err
    assert not (library / "store").exists()


# ---- what it takes


def test_operations_figured_from_a_specification_are_those_that_the_engine_counts():
    for name in ("digits-gap", "cifar16-real", "deep", "wide", "small-resnet18", "small-resnet34", "tinystories"):
        spec = load_environment(name)
        counted = host_costs(spec.host, task_shape(spec.task)).train_per_sample * spec.batch_size
        assert batch_operations(spec) == pytest.approx(counted, rel=0.01), name


def test_a_preview_measures_itself_by_an_earlier_run_of_the_same_environments(library):
    request = DatagenRequest(matrix="tiny", store="store")
    (figured,) = preview(request).costs
    assert figured.source is None
    assert (figured.episodes, figured.cohorts, figured.alone_epochs) == (12, 3, 36)
    version = _generate(library).version
    (measured,) = preview(request).costs
    assert measured.source == "tiny@1"
    costs = version.table("costs", columns=["cpu_s_shared"])
    spent = pa.compute.sum(costs["cpu_s_shared"]).as_py() + 36 * previews.DECISION_S
    assert spent / 2 <= measured.seconds <= spent * 2
    size = sum(entry.size for entry in version.manifest.files)
    assert size / 2 <= measured.num_bytes <= size * 2
    other = preview(request.model_copy(update={"dataset": "other"})).costs[0]
    assert (other.source, other.seconds) == ("tiny@1", measured.seconds)


def test_a_dry_run_expands_the_plan_without_torch_and_prints_every_cell(library):
    code = (
        "import sys; from esper.cli.main import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'prefect' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "datagen", "--matrix", "tiny", "--dry-run", "--store", "store"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=library)
    assert done.returncode == 0, done.stderr
    *_, baseline, random, sampler, _, _, loaded = done.stdout.splitlines()
    assert loaded == "False False"
    assert [line.split() for line in (baseline, random, sampler)] == [
        ["tiny", "baseline", "3", "3", "·"],
        ["tiny", "random", "·", "·", "3"],
        ["tiny", "schedule-sampler", "3", "·", "·"],
    ]
    assert "1 of 1 environments from the operations of their hosts" in done.stdout


# ---- how far it is


def test_progress_counts_planned_done_and_failed_episodes_of_every_cell(library):
    dataset = open_store("store").dataset("tiny")
    assert progress(dataset).schema == PROGRESS
    assert progress(dataset).num_rows == 0
    generated = _generate(library, stand_in.raises_on_replicate_1)
    table = progress(dataset)
    assert table.to_pylist() == generated.progress.to_pylist()
    counts = {(r["controller"], r["epsilon"]): (r["planned"], r["done"], r["failed"]) for r in table.to_pylist()}
    assert counts[("baseline", 0.5)] == counts[("random", 1.0)] == counts[("schedule-sampler", 0.0)] == (3, 2, 1)
    assert progress_line(table) == "8 of 12 episodes done, 4 failed, 0 to go in 0 of 4 cells"
    planned = generated.version.manifest.provenance["planned"]
    assert [cell["planned"] for cell in planned] == table["planned"].to_pylist()


def test_progress_is_of_the_newest_plan_and_of_its_own_episodes_alone(library):
    _generate(library)
    _generate(library, selection=Selection(behaviours=("baseline",), episodes_per_combo=4, max_epochs=2))
    dataset = open_store("store").dataset("tiny")
    rows = progress(dataset).to_pylist()
    assert [(row["controller"], row["epsilon"], row["planned"], row["done"]) for row in rows] == [
        ("baseline", 0.0, 4, 4),
        ("baseline", 0.5, 4, 4),
    ]
    assert len(list((library / "store/tiny/plans").glob("*.json"))) == 2
    assert newest_plan(dataset).cells[0].planned == 4


def test_lines_say_the_sums_every_half_minute_and_a_terminal_shows_a_table_that_fits(library, monkeypatch):
    table = _generate(library, stand_in.raises_on_replicate_1).progress
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    with PlainReporter(stream) as reporter:
        for second in (10, 20, 31, 40):
            now[0] = float(second)
            reporter.table(lambda: table)
        reporter.table(lambda: table, at_end=True)
    assert stream.getvalue().count("8 of 12 episodes done") == 2
    assert [table_of_progress(table, rows).row_count for rows in (10, 3, 1)] == [4, 3, 1]
    assert summed(table, ["environment"]).to_pylist()[0]["failed"] == 4
    screen = io.StringIO()
    with BarReporter(Console(file=screen, force_terminal=True, width=120, height=40)) as reporter:
        reporter.begin("cohorts", 3)
        reporter.table(lambda: table)
    assert "schedule-sampler" in screen.getvalue()


# ---- what becomes of what fails


def test_an_error_that_comes_again_is_not_tried_a_third_time_and_a_death_is():
    tries = Tries()
    assert [tries(WorkerError("a")), tries(WorkerError("a"))] == [True, False]
    tries = Tries()
    assert [tries(WorkerError("a")), tries(WorkerError("b")), tries(WorkerError("c"))] == [True, True, False]
    tries = Tries()
    assert [tries(WorkerDiedError("-9")) for _ in range(MAX_TRIES)] == [True] * (MAX_TRIES - 1) + [False]


def _counts_calls(plan):
    with Path("calls").open("a") as file:
        file.write(f"{plan.replicate}\n")
    return stand_in.raises_on_replicate_1(plan)


def test_a_deterministic_failure_is_tried_twice_and_by_retry_failed_once_more(library):
    _generate(library, _counts_calls)
    assert (library / "calls").read_text().split().count("1") == 2
    _generate(library, _counts_calls)
    assert (library / "calls").read_text().split().count("1") == 2
    again = _generate(library, _counts_calls, retry_failed=True)
    assert (library / "calls").read_text().split().count("1") == 3
    assert (again.failed_episodes, again.sealed) == (4, False)
    whole = _generate(library, retry_failed=True)
    assert (whole.new_episodes, whole.failed_episodes, whole.version.number) == (4, 0, 2)


def _kills_workers(plan):
    """Replicate 0 kills its worker once, replicate 1 always."""
    deaths = Path(f"deaths-{plan.replicate}")
    if plan.replicate == 1 or (plan.replicate == 0 and not deaths.exists()):
        with deaths.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return stand_in.synthetic(plan)


@pytest.mark.slow
def test_killed_workers_are_replaced_and_what_kills_every_worker_is_recorded(library):
    generated = _generate(library, _kills_workers, workers=1)
    assert (generated.new_episodes, generated.failed_episodes) == (8, 4)
    assert [(library / f"deaths-{replicate}").read_text() for replicate in (0, 1)] == ["x", "x" * MAX_TRIES]
    errors = set(generated.version.table("episodes", columns=["error"])["error"].drop_null().to_pylist())
    assert len(errors) == 1
    assert "exit code -9" in errors.pop()


def _says_a_secret(plan):
    raise ValueError(f"no answer from https://me:{os.environ['PROBE_TOKEN']}@host/data")


def test_the_error_of_a_failed_episode_is_stored_without_credentials(library, monkeypatch):
    monkeypatch.setenv("PROBE_TOKEN", "tip-top-secret")
    failed = _generate(library, _says_a_secret).version.table("episodes", columns=["error"])
    assert failed["error"].unique().to_pylist() == ["ValueError: no answer from https://***@host/data"]


def test_a_run_with_failed_episodes_exits_with_1_after_sealing_and_says_how_to_see_why(library, monkeypatch, capsys):
    monkeypatch.setattr("esper.tolaria.rollout.run_cohort", stand_in.raises_on_replicate_1)
    assert main(["datagen", "--matrix", "tiny", "--env-ids", "tiny", *HERE, "--no-health"]) == 1
    said = capsys.readouterr()
    assert "episodes   8 new, 4 failed" in said.out
    assert "4 of the planned episodes failed; the rest is stored, sealed as tiny@1" in said.err
    assert "select environment, env_seed, error from episodes" in said.err
    monkeypatch.setattr("esper.tolaria.rollout.run_cohort", stand_in.synthetic)
    assert main(["datagen", "--matrix", "tiny", *HERE, "--retry-failed", "--no-health"]) == 0


def test_where_every_episode_failed_nothing_is_checked_and_the_exit_code_is_1(library, monkeypatch, capsys):
    def fails(plan):
        raise ZeroDivisionError("made up")

    monkeypatch.setattr("esper.tolaria.rollout.run_cohort", fails)
    assert main(["datagen", "--matrix", "tiny", *HERE]) == 1
    assert "12 of the planned episodes failed" in capsys.readouterr().err
    assert main(["datagen", "--matrix", "tiny", *HERE]) == 1, "the same command again, with nothing left to run"
    said = capsys.readouterr()
    assert "everything planned was there already" in said.out
    assert "12 of the planned episodes failed" in said.err
    assert not list((library / "store/tiny/versions").glob("*.verdict.json"))
