"""`esper ope` on a tiny dataset: what it writes, prints and refuses, and the ranking from past runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from flow_data import Prepared, prepare

from esper.cli.main import main
from esper.karn.store import open_store
from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.ope import ALL, OpeResult
from esper.simic.ope.calibration import behaviours_of
from esper.simic.ope.logged import load_logged
from esper.simic.ope.targets import rule_target
from esper.tolaria.workers import cohort_engine
from flows.ope import ope_scores
from flows.past_estimates import RESULT, live_returns, past_ranking
from flows.versions import rewards_of

RECIPE = """
members = 2
extra_sweeps = 1
steps_per_sweep = 2
batch_size = 16
[network]
head = "values"
hidden = 8
slot_hidden = 4
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("made")
    root = tiny.write_library(folder, replicates=3, horizon=4)
    (root / "recipes").mkdir()
    (root / "recipes" / "fqe.toml").write_text(RECIPE)
    (root / "recipes" / "iql.toml").write_text("value_steps = 5\nbatch_size = 16\n")
    with contextlib.chdir(folder):
        return prepare(folder, ("p", "q", "r"))


@pytest.fixture
def prepared(made: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A copy of its own, as the working directory."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return made.moved(tmp_path)


def ope(*arguments: str) -> int:
    return main(["ope", *arguments, "--store", "store", "--no-prefect", "--workers", "0"])


def test_an_unchecked_version_is_refused_unless_overridden_and_wrong_names_cost_nothing(prepared, capsys) -> None:
    folder = prepared.policies["p"].path
    assert ope("tiny", "--policy", folder) == 3
    assert "never checked" in capsys.readouterr().err
    assert ope("tiny", "--policy", "gone") == 1
    assert "no checkpoint at gone" in capsys.readouterr().err
    assert ope("tiny", "--policy", folder, "--recipe", "fqee") == 2
    assert "did you mean 'fqe'" in capsys.readouterr().err
    assert not list((Path("store") / "tiny" / "runs").glob("ope-*"))


def test_the_command_writes_and_prints_estimates_calibration_and_measured_advantages(prepared, capsys) -> None:
    folders = [prepared.policies[name].path for name in ("p", "q")]
    options = ["--override-health", "a small test", "--iql-critic", "--run-name", "o"]
    options += ["--branch-states", "3", "--branch-actions", "3"]
    assert ope("tiny", "--policy", *folders, *options) == 0
    said = capsys.readouterr()
    folder = Path("store") / "tiny" / "runs" / "o"
    result = OpeResult.model_validate_json((folder / RESULT).read_text())
    assert {(item.policy, item.environment) for item in result.policies} == {
        (name, place) for name in ("p", "q") for place in ("tiny", ALL)
    }
    assert {check.behaviour for check in result.behaviours} == {"baseline", "random"}
    assert result.num_behaviours_left_out == 1
    assert [(item.environment, len(item.policies)) for item in result.behaviour_ranking] == [("tiny", 3), (ALL, 3)]
    assert {item.then for item in result.branches} <= {"p itself", "q itself"}
    assert {item.critic for item in result.branches} == {"fqe", "policy", "iql"}
    assert all(2 <= item.num_actions <= 9 for item in result.branches)
    for word in ("estimated returns", "calibration on tiny", "covered:", "branch oracle", "WDR"):
        assert word in said.out
    assert "PDIS" not in said.out
    events = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sum(event["kind"] == "ope.ended" for event in events) == 1
    # The branches were run live, and learners do not see them.
    roles = open_store("store").dataset("tiny").seal(matrix_id="x", provenance={}).table("episodes", columns=["role"])
    assert roles["role"].to_pylist().count("online") == sum(
        item.num_actions for item in result.branches if item.critic == "fqe"
    )


def test_a_behaviour_replayed_over_its_own_episodes_has_the_logged_propensities(prepared) -> None:
    logged = load_logged(prepared.version, "v4", rewards_of(prepared.version))
    behaviours, _ = behaviours_of(logged)
    assert [b.name for b in behaviours] == ["baseline", "baseline ε 0.5", "random"]
    data = logged.transitions
    for behaviour in behaviours:
        target = rule_target(behaviour.spec, behaviour.epsilon, logged)
        rows = np.isin(data.episode_N, behaviour.episodes_E)
        states = data.state_N[rows]
        found = target.log_prob(states, data.action_NA[rows], data.mask_MT[states])
        assert found == pytest.approx(data.logp_N[rows], abs=1e-6)


def test_scores_for_selection_have_the_keys_that_were_asked_for_and_repeat(prepared) -> None:
    with tiny.context(prepared.folder, cohort_engine) as context:
        asked = {"first": prepared.policies["p"], "second": prepared.policies["q"]}
        scores = ope_scores(context, prepared.version, asked)
        assert list(scores) == ["first", "second"]
        assert ope_scores(context, prepared.version, asked) == scores
        assert (context.folder / RESULT).is_file()


def test_ranking_comes_from_stored_estimates_and_live_episodes_of_the_same_weights(prepared) -> None:
    with tiny.context(prepared.folder, cohort_engine) as context:
        prepared.evaluate(context)
        live = live_returns(context.dataset, prepared.version)
        assert set(live) == {policy.digest for policy in prepared.policies.values()}
        ope_scores(context, prepared.version, prepared.policies)
        newest = OpeResult.model_validate_json((context.folder / RESULT).read_text())
        (found,) = past_ranking(context.dataset, prepared.version, newest)
        names = [f"{name} {policy.digest[:6]}" for name, policy in prepared.policies.items()]
        assert sorted(found.policies) == sorted(names)
        digest_of = dict(zip(names, (policy.digest for policy in prepared.policies.values())))
        assert [live[digest_of[name]]["tiny"] for name in found.policies] == pytest.approx(found.live)
        other: dict[str, LearnedPolicy] = {"p": prepared.policies["p"]}
        assert set(ope_scores(context, prepared.version, other)) == {"p"}
