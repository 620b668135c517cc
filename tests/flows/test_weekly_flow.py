"""The weekly deployment as a whole: a sealed version in, a policy, a comparison with every control and a report out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from esper.cli.main import main
from flows.server import running_server


@pytest.fixture(scope="module")
def weekly(tmp_path_factory):
    """What the flow answered, twice, under a Prefect server."""
    folder = tmp_path_factory.mktemp("weekly")
    tiny.write_pipeline(folder, bounds="[-100.0, 100.0]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["datagen", "--matrix", "tiny", "--store", "store", "--workers", "1", "--no-prefect"]) == 0
        assert main(["health", "tiny@1", "--store", "store", "--no-prefect"]) == 0
        with running_server(folder / "store" / ".prefect"):
            from flows.deployments import train_and_evaluate

            given = {"dataset": "tiny@1", "pipeline": "tiny", "store": "store", "algorithm": "bc", "seeds": [0, 1]}
            answers = [train_and_evaluate(**given, workers=1, once=True) for _ in range(2)]
        yield answers, folder / "store"


def test_it_leaves_a_policy_for_each_seed_a_comparison_with_every_control_and_a_report(weekly):
    (answer, _), store = weekly
    assert answer["version"] == "tiny@1"
    assert set(answer["policies"]) == {"bc-s0", "bc-s1"}
    assert answer["failed_controls"] == []
    run = store / "tiny" / "runs" / answer["run"]
    arms = {arm["arm"] for arm in json.loads((run / "evaluation.json").read_text())["arms"]}
    assert arms >= {"never-act", "random", "heuristic", "best-fixed", "bigger", "wider", "bc-s0", "bc-s1"}
    assert Path(answer["report"]).stat().st_size > 10_000
    assert "bc" in Path(answer["comparison"]).read_text()


def test_started_again_it_leaves_alone_what_was_compared(weekly):
    (answer, again), _ = weekly
    assert again["version"] == "tiny@1"
    assert answer["run"] in again["skipped"]
