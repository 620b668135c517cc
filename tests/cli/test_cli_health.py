"""`esper health` and the one line that other commands print about the data they touch."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pytest
from factories import synthetic_tables

from esper.cli.main import main
from esper.karn.overrides import record_override
from esper.karn.store import open_store
from esper.leyline.library import load
from esper.leyline.matrix import MatrixSpec
from esper.leyline.rewards import RewardSpec
from esper.leyline.specs import EnvironmentSpec
from esper.leyline.verdict import CheckResult, Level, Use, Verdict

CODE = """
import sys
from esper.cli.main import main
code = main(sys.argv[1:])
print([name for name in ("torch", "prefect") if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def provenance():
    reward, environment = load("rewards", "digits-gap", RewardSpec), load("environments", "digits-gap", EnvironmentSpec)
    return {
        "rewards": {"digits-gap": reward.model_dump(mode="json")},
        "environments": {"digits-gap": environment.model_dump(mode="json")},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store with demo@1: two behaviours, which health blocks."""
    root = tmp_path_factory.mktemp("store")
    dataset = open_store(root).dataset("demo")
    dataset.commit(synthetic_tables(num_env_seeds=3, horizon=20))  # as the library has it: it can be extended
    dataset.seal(matrix_id="m", provenance=provenance())
    return root


@pytest.fixture(scope="module")
def as_json(root):
    command = [sys.executable, "-c", CODE, "health", "demo", "--store", str(root), "--format", "json"]
    return subprocess.run([*command, "--run-name", "r1"], capture_output=True, text=True, check=False)


def run(root, capsys, *command):
    code = main([*command, "--store", str(root)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_verdict_as_json_is_all_of_stdout_and_a_block_exits_with_3(as_json, root):
    assert as_json.returncode == 3
    told = json.loads(as_json.stdout)
    assert told["levels"]["offline-rl"] == "block"
    assert told["overrides"] == []
    verdict = Verdict.model_validate({key: told[key] for key in Verdict.model_fields})
    assert open_store(root).resolve("demo").verdict() == verdict
    assert "demo@1 is blocked for offline RL" in as_json.stderr


def test_neither_torch_nor_prefect_is_imported(as_json):
    assert as_json.stderr.splitlines()[-1] == "[]"


def test_the_page_lies_where_the_json_says(as_json, root):
    page = root / "demo/runs/r1/health/demo@1.html"
    assert json.loads(as_json.stdout)["page"] == str(page)
    assert "<h1>Health of demo@1</h1>" in page.read_text()


def test_the_table_lists_what_fails_worst_first_and_counts_the_rest(root, capsys):
    code, out, err = run(root, capsys, "health", "demo", "--run-name", "r2")
    assert code == 3
    lines = out.splitlines()
    levels = [line.split()[0] for line in lines[1:] if line.split()[:1] in (["block"], ["warn"], ["pass"], ["report"])]
    assert levels == sorted(levels, key=("block", "warn").index)
    assert "block" in levels
    assert "; --all lists every one" in out
    assert "what would help: esper health demo@1 --suggest" in out
    assert "is blocked for offline RL" in err


def test_all_lists_the_passes_too_and_overrides_are_printed(root, capsys):
    version = open_store(root).resolve("demo")
    record_override(version, Use.OFFLINE_RL, Level.BLOCK, "to show [bold]it[/]", "iql")
    _, out, _ = run(root, capsys, "health", "demo", "--all", "--run-name", "r3")
    version.path.with_name("1.overrides.jsonl").unlink()
    assert "legal_transitions" in out
    assert "--all lists every one" not in out
    assert "by iql against its health (verdict block): to show [bold]it[/]" in out


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--rows", "structur"], "did you mean 'structure'"),
        (["--rows", "structure", "--suggest"], "one of them at a time"),
        (["--format", "csv"], "--rows"),
        (["--output", "x.toml"], "--suggest"),
        (["--rows", "structure", "--limit", "0"], "--limit"),
    ],
)
def test_options_that_do_not_go_together_exit_with_2(options, hint, root, capsys):
    code, out, err = run(root, capsys, "health", "demo", *options)
    assert (code, out) == (2, "")
    assert hint in err


def test_the_rows_that_fail_a_check_are_listed_as_json_csv_and_table_and_nothing_is_checked(tmp_path, capsys):
    tables = synthetic_tables()
    points = tables["steps"]["reward_accuracy_points"].to_pylist()
    points[2] += 1.0
    wrong = tables["steps"].select(["episode_id", "step"]).slice(2, 1).to_pylist()
    place = tables["steps"].schema.get_field_index("reward_accuracy_points")
    tables["steps"] = tables["steps"].set_column(place, tables["steps"].schema.field(place), pa.array(points))
    dataset = open_store(tmp_path).dataset("faulty")
    dataset.commit(tables)
    version = dataset.seal(matrix_id="m", provenance=provenance())
    code, out, err = run(tmp_path, capsys, "health", "faulty", "--rows", "reward_recompute", "--format", "json")
    assert (code, err) == (0, "1 rows of faulty@1 fail reward_recompute\n")
    assert [{key: row[key] for key in ("episode_id", "step")} for row in json.loads(out)] == wrong
    _, out, err = run(tmp_path, capsys, "health", "faulty", "--rows", "reward_recompute", "--format", "csv")
    assert len(out.splitlines()) == 2
    _, out, err = run(tmp_path, capsys, "health", "faulty", "--rows", "reward_recompute", "--limit", "1")
    assert wrong[0]["episode_id"] in out
    assert "at least 1 rows" in err
    assert version.verdict() is None
    assert not (tmp_path / "faulty" / "runs").exists()


def test_a_check_without_rows_of_its_own_exits_with_2_and_says_which_have(root, capsys):
    code, _, err = run(root, capsys, "health", "demo", "--rows", "action_coverage")
    assert code == 2
    assert "reward_recompute" in err


def test_the_suggestion_is_a_matrix_that_datagen_takes(as_json, root, capsys, tmp_path):
    path = tmp_path / "remedy.toml"
    code, out, err = run(root, capsys, "health", "demo", "--suggest", "--output", str(path))
    assert (code, out) == (0, "")
    assert f"next: esper datagen --matrix {path} --dataset demo" in err
    assert MatrixSpec.from_toml(path).name == "demo-remedy-1"
    code, out, _ = run(root, capsys, "health", "demo", "--suggest")
    assert out == path.read_text()


def test_a_suggestion_needs_a_verdict_and_a_file_that_can_be_written(as_json, root, small, capsys, tmp_path):
    code, _, err = run(small.root.parent, capsys, "health", "small", "--suggest")
    assert (code, "run `esper health small@1` first" in err) == (3, True)
    code, _, err = run(root, capsys, "health", "demo", "--suggest", "--output", str(tmp_path / "no" / "x.toml"))
    assert (code, "cannot write" in err) == (1, True)


@pytest.fixture
def small(tmp_path):
    dataset = open_store(tmp_path / "small").dataset("small")
    dataset.commit(synthetic_tables())
    return dataset.seal(matrix_id="m", provenance=provenance())


def judge(version, level):
    check = CheckResult(name="c", environment="all", level=level, value=0.0, message="m")
    version.write_verdict(
        Verdict(
            dataset=version.name, version=1, digest=version.manifest.digest, checked_at="2026-01-01", checks=(check,)
        )
    )


def test_sql_says_in_one_line_that_the_data_are_blocked_or_unchecked_and_nothing_else(small, capsys):
    def lines():
        code, out, err = run(small.root.parent, capsys, "sql", "SELECT count(*) AS n FROM episodes", "--format", "csv")
        assert (code, out.splitlines()[0]) == (0, '"n"')
        return err.splitlines()[1:]

    assert lines() == ["health of small@1: never checked; run `esper health small@1`"]
    judge(small, Level.BLOCK)
    assert lines() == ["health of small@1: imitation block, offline-rl block, off-policy-evaluation block"]
    judge(small, Level.WARN)
    assert lines() == []


def test_train_and_report_print_the_verdict_of_every_use(small, capsys):
    judge(small, Level.BLOCK)
    told = "health of small@1: imitation block, offline-rl block, off-policy-evaluation block"
    for command in (["train", "bc", "small"], ["report", "small"]):
        code, _, err = run(small.root.parent, capsys, *command, "--no-prefect")
        assert code == (3 if command[0] == "train" else 0)
        assert err.splitlines()[0] == told


def test_train_takes_a_reason_and_refuses_an_empty_one_before_anything_runs(small, capsys):
    judge(small, Level.BLOCK)
    code, _, err = run(small.root.parent, capsys, "train", "bc", "small", "--no-prefect", "--override-health", " ")
    assert code == 2
    assert "the reason for overriding" in err
    assert not (small.root / "runs").exists()


def test_a_dataset_shows_the_verdict_of_every_use(small, capsys):
    judge(small, Level.WARN)
    _, out, _ = run(small.root.parent, capsys, "dataset", "show", "small")
    assert [line.split()[-1] for line in out.splitlines() if "verdict for" in line] == ["warn"] * 3
