"""`esper poc` through the command line, on a host that trains in milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny

import flows.context
from esper.cli.main import main
from esper.leyline.poc import IncubationFile, PocFile

GROWTH = ["poc", "growth", "--task", "tiny", "--seeds", "2", "--workers", "0", "--no-prefect", "--store", "store"]
ARMS = [
    "host",
    "host-drop",
    "wider-drop",
    "bigger",
    "bigger-drop",
    "bigger-zero-drop",
    "bigger-all-drop",
    "published",
    "early-mid",
    "early-all",
    "heuristic",
]


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    root = tiny.write_library(tmp_path, horizon=6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ESPER_DATA", raising=False)
    return root


def read(path):
    return PocFile.model_validate_json(path.read_text())


def test_growth_writes_a_page_with_every_arm_and_the_raw_values_beside_it(tmp_path, capsys):
    assert main([*GROWTH, "--out", "out/poc.md"]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "out" / "poc.md").read_text()
    (table,) = read(tmp_path / "out" / "poc.json").tables
    assert [arm.name for arm in table.arms] == ARMS
    assert table.replicates == (200_000, 200_001)
    assert all(len(arm.test_percent_by_seed) == 2 and arm.num_epochs == 6 for arm in table.arms)
    for text in (said, page):
        assert all(arm in text for arm in ARMS)
    assert "$ esper poc growth --task tiny --seeds 2 --store store --workers 0 --out out/poc.md" in page
    assert table.origin.digest in page
    assert "80.16" not in page  # the published figures are about CIFAR-10


def test_a_second_run_computes_nothing_and_a_second_study_joins_the_page(tmp_path, capsys, monkeypatch):
    assert main([*GROWTH, "--out", "poc.md"]) == 0
    first = read(tmp_path / "poc.json").tables[0]
    monkeypatch.setattr(flows.context.Context, "_finish", lambda *_: pytest.fail("a stored cohort ran again"))
    assert main([*GROWTH, "--out", "poc.md"]) == 0
    (again,) = read(tmp_path / "poc.json").tables
    assert again.arms == first.arms
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    command = ["poc", "sunk-cost", *GROWTH[2:], "--warm-epochs", "2", "--further-epochs", "5", "--out", "poc.md"]
    assert main(command) == 0
    tables = read(tmp_path / "poc.json").tables
    assert [table.study for table in tables] == ["growth", "sunk-cost"]
    assert "--warm-epochs 2 --further-epochs 5" in tables[1].origin.command
    assert {"continued", "grown", "new-bigger"} <= {arm.name for arm in tables[1].arms}
    assert "## Sunk cost" in (tmp_path / "poc.md").read_text()


def test_chosen_arms_come_with_their_references(tmp_path):
    assert main([*GROWTH, "--arms", "published", "--learning-rate", "0.02", "--out", "poc.md"]) == 0
    (table,) = read(tmp_path / "poc.json").tables
    assert [arm.name for arm in table.arms] == ["host-drop", "bigger-drop", "published"]
    assert "at 0.02" in table.clock
    assert "--learning-rate 0.02 --arms published" in table.origin.command


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch):
    original, calls, going_on = flows.context.Context._finish, [], []

    def interrupt_after_two(self, *arguments):
        (going_on or calls).append(arguments)
        if not going_on and len(calls) > 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(flows.context.Context, "_finish", interrupt_after_two)
    with pytest.raises(SystemExit) as exit_:
        main([*GROWTH, "--out", "poc.md"])
    assert exit_.value.code == 130
    assert not (tmp_path / "poc.md").exists()
    going_on.append("from here on")
    assert main([*GROWTH, "--out", "poc.md"]) == 0
    assert len(going_on) == 1 + 6 - 2


def test_incubation_writes_gains_correlations_and_costs(tmp_path, library):
    environment = library / "environments" / "tiny.toml"
    environment.write_text(environment.read_text().replace("horizon = 6", "horizon = 11"))
    command = ["poc", "incubation", *GROWTH[2:], "--out", "inc.md"]
    assert main(command) == 0
    (table,) = IncubationFile.model_validate_json((tmp_path / "inc.json").read_text()).tables
    assert {(arm.incubation, arm.incubation_epochs) for arm in table.arms} == {
        (way, epochs) for way in ("own_pass", "linearised") for epochs in (1, 3, 6)
    }
    assert {(p.incubation_epochs, p.epoch) for p in table.probes} >= {(1, 1), (3, 3), (6, 6)}
    assert all(p.num_episodes == 8 for p in table.probes)  # two blueprints, two slots, two seeds
    page = (tmp_path / "inc.md").read_text()
    assert "conv_heavy, early" in page
    assert "own pass over linearised" in page


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["growth", "--task", "tinny"], "did you mean 'tiny'"),
        (["growth", "--task", "tiny", "--sedes", "3"], "--seeds"),
        (["growth", "--task", "tiny", "--seeds", "1"], "seeds"),
        (["growth", "--task", "tiny", "--train-rows", "10"], "has a fixed size"),
        (["growth", "--task", "tiny", "--resolution", "16"], "has a fixed size"),
        (["growth", "--task", "tiny", "--max-epochs", "3"], "too few"),
        (["growth", "--task", "tiny", "--learning-rate", "0"], "learning_rate"),
        (["growth", "--task", "tiny", "--arms", "early-midd", "--no-prefect"], "did you mean 'early-mid'"),
        (["incubation", "--task", "tiny"], "at least 11"),
        (["sunk-cost", "--task", "tiny", "--further-epochs", "4"], "further_epochs"),
        (["grwth"], "grwth"),
    ],
)
def test_a_wrong_name_or_size_exits_with_2_before_anything_is_written(arguments, hint, capsys, tmp_path):
    assert main(["poc", *arguments]) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert "after validation" not in said
    assert not (tmp_path / "docs").exists()
    assert not (tmp_path / "datasets" / "local").exists()


def test_missing_data_is_one_message_that_names_the_folder(capsys, tmp_path):
    arguments = ["poc", "growth", "--task", "cifar10", "--data", "nowhere", "--no-prefect", "--store", "store"]
    assert main(arguments) != 0
    said = capsys.readouterr().err
    assert said.startswith("error:")
    assert "nowhere" in said
    assert not (tmp_path / "store").exists()


def test_a_page_whose_json_is_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "poc.json").write_text(json.dumps({"tables": [{"study": "growth"}]}))
    assert main([*GROWTH, "--out", "poc.md"]) == 4
    assert "move it away" in capsys.readouterr().err
    assert json.loads((tmp_path / "poc.json").read_text()) == {"tables": [{"study": "growth"}]}
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("study", ["growth", "incubation"])
@pytest.mark.parametrize(("out", "code"), [(".", 2), ("page.json", 2), ("a-file/page.md", 1), ("folder.md", 1)])
def test_a_page_that_cannot_be_written_is_said_before_anything_runs(study, out, code, tmp_path, capsys, library):
    environment = library / "environments" / "tiny.toml"
    environment.write_text(environment.read_text().replace("horizon = 6", "horizon = 11"))
    (tmp_path / "a-file").touch()
    (tmp_path / "folder.md").mkdir()
    assert main(["poc", study, *GROWTH[2:], "--out", out]) == code
    assert out in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", [["poc", "--help"], ["poc", "growth", "--help"], ["heuristic", "--help"]])
def test_help_imports_neither_torch_nor_prefect(command):
    code = (
        "import sys; from esper.cli.main import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'prefect', 'pyarrow') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "--task" in done.stdout or "growth" in done.stdout
