"""`esper train imitate` on a tiny dataset: trained, judged, live beside the heuristic, printed and written down."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import tiny

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.imitation import ActionClass, Confusion, ImitationResult
from esper.simic.imitation import CHOICES
from esper.tamiyo.checkpoints import read_card
from esper.tolaria.rollout import run_cohort
from flows.planning import plan_matrix

HERE = ["--store", "store", "--no-prefect", "--workers", "0"]
TRAIN = ["train", "imitate", "tiny", *HERE, "--override-health", "a test of four seeds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five environment seeds of `baseline` and `random`, long enough for the rule to act, and a policy of them."""
    folder = tmp_path_factory.mktemp("imitation")
    root = tiny.write_library(folder, replicates=5, horizon=14)
    (root / "recipes").mkdir()
    (root / "recipes" / "imitate.toml").write_text('behaviours = ["baseline"]\nsteps = 60\nlog_every = 20\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        dataset = open_store("store").dataset("tiny")
        _, plans = plan_matrix("tiny")
        for plan in plans:
            dataset.commit(run_cohort(plan))
        specs = {"environments": {"tiny": plan.environment}, "rewards": {"tiny": plan.reward}}
        provenance = {
            key: {name: spec.model_dump(mode="json") for name, spec in of.items()} for key, of in specs.items()
        }
        dataset.seal(matrix_id="tiny", provenance=provenance)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main([*TRAIN, "--run-name", "r1", "--live-env-seeds", "3"]) == 0
        (folder / "said.txt").write_text(said.getvalue())
        yield folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_it_is_judged_on_held_out_seeds_and_live_and_both_are_printed_and_stored(folder):
    said = (folder / "said.txt").read_text()
    run = folder / "store/tiny/runs/r1"
    result = ImitationResult.model_validate_json((run / "imitation.json").read_text())
    card = read_card(run / "checkpoints/imitate")
    assert (card.algorithm, card.network.kind, card.dataset) == ("imitate", "imitation", "tiny@1")
    assert result.choices == Confusion.from_metrics(card.metrics, CHOICES)
    assert result.all_decisions.total == 14  # the one episode of the one held-out seed
    assert card.metrics["training_rows"] == 4 * 14
    (live,) = result.live
    assert (live.environment, live.num_env_seeds, result.heuristic) == ("tiny", 3, "heuristic")
    for agreement in (live.on_heuristic, live.on_imitation):
        assert agreement.choices.total + agreement.num_forced == 3 * 14
    assert live.test_difference.mean == pytest.approx(
        live.imitation_test_percent.mean - live.heuristic_test_percent.mean
    )
    for text in ("balanced accuracy", "precision %", "imitate beside heuristic on tiny", "its own episodes"):
        assert text in said
    for code in ActionClass:
        assert code.name in said


def test_its_live_episodes_join_the_dataset_and_are_not_learned_from(folder):
    dataset = open_store("store").dataset("tiny")
    version = dataset.seal(matrix_id="again", provenance=dataset.versions()[0].manifest.provenance)
    rows = version.table("episodes", columns=["role", "controller"]).to_pylist()
    live = [row["controller"] for row in rows if row["role"] == "selection"]
    assert live.count("heuristic") == live.count("imitate") == 3
    assert main([*TRAIN, "--run-name", "r3", "--live-env-seeds", "0"]) == 0
    again = read_card(folder / "store/tiny/runs/r3/checkpoints/imitate")
    first = read_card(folder / "store/tiny/runs/r1/checkpoints/imitate")
    assert again.dataset == "tiny@2"
    assert again.weights_sha256 == first.weights_sha256


def test_another_rule_can_stand_beside_it_and_wrong_names_are_named(folder, capsys):
    assert main([*TRAIN, "--run-name", "r2", "--live-env-seeds", "2", "--heuristic", "aggressive"]) == 0
    written = json.loads((folder / "store/tiny/runs/r2/imitation.json").read_text())
    assert (written["heuristic"], len(written["live"])) == ("aggressive", 1)
    capsys.readouterr()
    assert main([*TRAIN, "--heuristic", "agressive"]) == 2
    assert "did you mean 'aggressive'" in capsys.readouterr().err
    assert main([*TRAIN, "--heuristic", "random"]) == 2
    assert "no rules to stand beside" in capsys.readouterr().err
