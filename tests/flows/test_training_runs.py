"""`esper train` as a user runs it: grids and seeds as one flow, what is stored stays, and what went wrong is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import learning
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper.cli.main import main
from esper.leyline.events import Event, EventKind
from esper.leyline.grid import TrainingTable
from esper.tamiyo.checkpoints import PolicyCard, read_card, save_checkpoint
from esper.tamiyo.flat import FlatSpec
from esper.tamiyo.imitation import ImitationSpec
from esper.tamiyo.kinds import build_network
from esper.tamiyo.networks import NetworkSpec
from flows.grid import RESULT, TrainRequest, run_training
from flows.orchestration import LocalOrchestrator, Unit

HERE = ["--store", "store", "--no-prefect", "--workers", "0", *learning.REASON]
GRID = """
[[learners]]
algorithm = "bc"
[[learners]]
algorithm = "iql"
[learners.fields]
expectile = [0.5, 0.9]
network.hidden = [8]
"""


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    learning.write_store(folder)
    return folder / "store"


@pytest.fixture(autouse=True)
def here(sealed, tmp_path, monkeypatch):
    """A working directory with a store and recipes of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    learning.write_recipes(tmp_path)
    shutil.copytree(sealed, tmp_path / "store")


class Recording(LocalOrchestrator):
    """Remembers the batches of units that it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.batches: list[list[tuple[str, str]]] = []

    def units(self, units: list[Unit]):
        self.batches.append([(unit.kind, unit.name) for unit in units])
        return super().units(units)


def folder(run: str) -> Path:
    return Path("store/small/runs") / run


def test_a_grid_with_two_seeds_is_one_batch_with_a_unit_for_each_and_the_table_holds_all(tmp_path):
    request = TrainRequest(
        dataset="small",
        grid=learning.write_grid(tmp_path, GRID),
        seeds=(0, 3),
        store="store",
        workers=0,
        run_name="r",
        override_health="a test",
    )
    request.check()
    recording = Recording()
    table = run_training(request, recording).table
    names = ["bc-s0", "bc-s3", *(f"iql-expectile-{tau}-s{seed}" for tau in (0.5, 0.9) for seed in (0, 3))]
    assert recording.batches == [[("train", name) for name in names]]
    assert [row.policy.name for row in table.rows] == names
    assert len({row.policy.digest for row in table.rows}) == 6
    assert TrainingTable.model_validate_json((folder("r") / RESULT).read_text()) == table
    card = read_card(folder("r") / "checkpoints" / "iql-expectile-0.9-s3")
    assert (card.recipe["expectile"], card.network.hidden, card.training_seed) == (0.9, 8, 3)
    assert not (folder("r") / "progress").exists()


def test_the_same_run_name_trains_only_what_is_not_there(tmp_path, capsys):
    grid = learning.write_grid(tmp_path, GRID)
    assert main(["train", "small", "--grid", grid, "--run-name", "r", *HERE]) == 0
    first = capsys.readouterr().out
    assert first.count("iql-expectile-") == 2
    cards = {path.parent.name: path.read_bytes() for path in folder("r").glob("checkpoints/*/policy.safetensors")}
    (folder("r") / "checkpoints" / "bc" / "policy.json").unlink()
    assert main(["train", "small", "--grid", grid, "--run-name", "r", *HERE]) == 0
    table = TrainingTable.model_validate_json((folder("r") / RESULT).read_text())
    assert [row.was_stored for row in table.rows] == [False, True, True]
    assert {path.parent.name: path.read_bytes() for path in folder("r").glob("checkpoints/*/*.safetensors")} == cards
    assert main(["train", "iql", "small", "--grid", grid, "--seeds", "1", "--run-name", "r", *HERE]) == 0
    table = TrainingTable.model_validate_json((folder("r") / RESULT).read_text())
    assert [(row.seed, row.was_stored) for row in table.rows] == [(1, False), (1, False)]


@pytest.mark.parametrize("algorithm", ["bc", "rwbc", "iql", "cql", "imitate", "d3rlpy-bc", "d3rlpy-cql"])
def test_every_learner_trains_by_its_recipe_and_leaves_a_card_page(algorithm, capsys):
    backend, _, name = algorithm.rpartition("-")
    command = ["train", name, "small", "--run-name", "r", *HERE]
    command += ["--backend", backend] if backend else []
    command += ["--live-env-seeds", "0"] if name == "imitate" else []
    assert main(command) == 0
    said = capsys.readouterr().out
    checkpoint = folder("r") / "checkpoints" / algorithm
    assert str(checkpoint) in said
    assert (card := read_card(checkpoint)).algorithm == name
    assert card.network.kind == {"imitate": "imitation"}.get(name, "flat" if backend else "tree")
    page = (checkpoint / "README.md").read_text()
    assert page.startswith(f"# Policy `{algorithm}`\n")
    assert f"`{card.dataset}`, digest `{card.dataset_digest}`, verdict: none" in page
    assert "Reason: a test" in page
    assert f"`{card.weights_sha256}`" in page
    assert "held-out" in page


def test_losses_are_events_and_tensorboard_scalars_step_by_step():
    assert main(["train", "iql", "small", "--tensorboard", "--run-name", "r", *HERE]) == 0
    lines = [line for path in folder("r").glob("events-*.jsonl") for line in path.read_text().splitlines()]
    events = [event for event in map(Event.model_validate_json, lines) if event.kind is EventKind.TRAIN_STEP]
    for policy, name in (("iql", "iql"), ("iql (values)", "iql-values")):
        read = EventAccumulator(str(folder("r") / "tensorboard" / name)).Reload()
        mine = [event.data for event in events if event.data["policy"] == policy]
        assert [data["step"] for data in mine] == [2, 4]
        for tag in set(mine[0]) - {"policy", "step"}:
            told = [(data["step"], data[tag]) for data in mine]
            assert [(e.step, e.value) for e in read.Scalars(tag)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in told]


def test_patience_stops_early_and_the_table_says_at_which_step(tmp_path):
    (tmp_path / "datasets/recipes/bc.toml").write_text(
        "steps = 400\nlearning_rate = 0.3\n" + learning.SMALL.format(log_every=1)
    )
    assert main(["train", "bc", "small", "--patience", "2", "--run-name", "r", *HERE]) == 0
    metrics = read_card(folder("r") / "checkpoints" / "bc").metrics
    assert metrics["step"] < 400
    assert metrics["step"] == metrics["chosen_step"] + 2


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["iqll", "small"], 2, "unknown learner 'iqll'; did you mean 'iql'"),
        (["iql", "small", "--recipe", "iq"], 2, "did you mean 'iql'"),
        (["iql", "small", "--recipe", "bad.toml"], 2, "unknown key 'expectil'; did you mean 'expectile'"),
        (["iql", "small", "--grid", "bad-grid.toml"], 2, "unknown key 'network.hiden'; did you mean 'hidden'"),
        (["cql", "small", "--grid", "bad-grid.toml"], 2, "no learner cql"),
        (["bc", "small", "--grid", "bad-grid.toml", "--recipe", "bc"], 2, "--recipe has no effect on a grid"),
        (["small", "--grid", "offlin"], 2, "did you mean 'offline'"),
        (["bc", "small", "--seeds", "1", "1"], 2, "named twice"),
        (["bc", "small", "--name", "../up"], 2, "pattern"),
        (["imitate", "small", "--seeds", "0", "1", "--live-env-seeds", "5"], 2, "for 2 policies"),
        (["bc", "small", "--patience", "0"], 2, "patience"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, code, hint, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("expectil = 0.5\n")
    (tmp_path / "bad-grid.toml").write_text(
        'name = "b"\n[[learners]]\nalgorithm = "iql"\nfields.network.hiden = [1]\n[[learners]]\nalgorithm = "bc"\n'
    )
    assert main(["train", *arguments, "--store", "store", *learning.REASON]) == code
    assert hint in capsys.readouterr().err
    assert not Path("store/small/runs").exists()
    assert not Path("store/.prefect").exists()


def test_without_a_verdict_a_grid_is_refused_once_and_nothing_is_trained(tmp_path, capsys):
    grid = learning.write_grid(tmp_path, GRID)
    assert main(["train", "small", "--grid", grid, "--run-name", "r", *HERE[:5]]) == 3
    assert capsys.readouterr().err.count("never checked\n  run `esper health") == 1
    assert not (folder("r") / "checkpoints").exists()


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.grid.train_rows", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["train", "bc", "small", "--run-name", "r", *HERE])
    assert ended.value.code == 130
    assert "the same command with --run-name r goes on from there" in capsys.readouterr().err


def test_one_failing_policy_costs_the_others_nothing(tmp_path, capsys):
    grid = learning.write_grid(
        tmp_path, '[[learners]]\nalgorithm = "bc"\nname = "wild"\nfields.learning_rate = [1e30]\n' + GRID
    )
    assert main(["train", "small", "--grid", grid, "--run-name", "r", *HERE]) == 1
    said = capsys.readouterr().err
    assert "error: wild: the loss of the policy is" in said
    assert "--run-name r goes on from there" in said
    assert sorted(path.name for path in (folder("r") / "checkpoints").iterdir()) == [
        "bc",
        "iql-expectile-0.5",
        "iql-expectile-0.9",
    ]


@pytest.mark.parametrize(
    ("network", "hint"),
    [
        (NetworkSpec(trunk="gru"), "recurrent (trunk gru)"),
        (NetworkSpec(form="atomic", num_leaves=3), "one value per whole action"),
        (ImitationSpec(), "an imitation policy"),
        (FlatSpec(num_actions=3), "a flat list of actions"),
    ],
)
def test_ppo_says_which_checkpoints_it_cannot_go_on_from(network, hint, capsys):
    card = PolicyCard(
        name="p", algorithm="bc", network=network, recipe={}, rewards={}, dataset="small@1", training_seed=0
    )
    save_checkpoint(Path("p"), build_network(network), card)
    assert main(["train", "ppo", "--from", "p", *HERE[:5]]) == 2
    said = capsys.readouterr().err
    assert "checkpoint p cannot be fine-tuned" in said
    assert hint in said


def test_the_bundled_grids_hold_recipes_that_load(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    from esper.simic.training import load_recipe

    for name in ("offline", "offline-hidden", "iql-cql", "cql-forms"):
        for point in TrainRequest(dataset="small", grid=name).points():
            assert json.loads(
                load_recipe(point.algorithm, point.backend, point.recipe, point.changes).model_dump_json()
            )
