"""Selection and stored episodes in a real store; the episodes are made up."""

import json

import pytest
import stand_in
import tiny

from esper.leyline.controller_specs import LearnedPolicy
from esper.leyline.errors import SpecError
from esper.leyline.pipelines import EvaluationCell, PipelineSpec
from esper.simic.arms import COLUMNS
from flows.selection import select_policies
from flows.stored_runs import StoredRuns

CELL = EvaluationCell(environment="digits-gap", reward="digits-gap", env_seeds=2, selection_seeds=2)
PIPELINE = PipelineSpec(name="demo", matrix="demo", evaluation=(CELL,))


class Counting:
    """An engine that remembers what it ran."""

    def __init__(self):
        self.ran = []

    def __call__(self, plan):
        self.ran.append((plan.replicate, len(plan.episodes)))
        return stand_in.synthetic(plan)


def test_what_is_stored_is_read_and_only_the_rest_is_run(tmp_path):
    engine = Counting()
    everything = stand_in.plans(3)
    with tiny.context(tmp_path, engine) as context:
        first = StoredRuns(context, COLUMNS).run("test", everything[:2])
        engine.ran.clear()
        one_more = [plan.model_copy(update={"episodes": plan.episodes[:1]}) for plan in everything[2:]]
        StoredRuns(context, COLUMNS).run("test", one_more)
        again = StoredRuns(context, COLUMNS).run("test", everything)
    assert engine.ran == [(2, 1), (2, len(everything[2].episodes) - 1)]
    for fresh, read, plan in zip(first, again, everything):
        for name, columns in COLUMNS.items():
            order = [("episode_id", "ascending")] + [("step", "ascending")] * (name == "steps")
            expected = fresh[name].select(columns).sort_by(order)
            assert read[name].sort_by(order).equals(expected.cast(read[name].schema))
        assert set(read["episodes"]["episode_id"].to_pylist()) == set(plan.episode_ids())
    assert len(again[2]["episodes"]) == len(everything[2].episodes)


def test_the_best_three_meet_live_and_the_winner_alone_is_reported(tmp_path):
    policies = {
        name: LearnedPolicy(name=name, path="nowhere", digest=f"{i:064}") for i, name in enumerate(("a", "b", "c", "d"))
    }
    engine = Counting()
    with tiny.context(tmp_path, engine) as context:
        context.run_plans("data", stand_in.plans(2))
        version = context.dataset.seal(matrix_id="m", provenance={})
        engine.ran.clear()
        scores = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7}
        selected = select_policies(context, version, policies, scores, PIPELINE)
        with pytest.raises(SpecError, match="finite number"):
            select_policies(context, version, policies, {**scores, "a": float("inf")}, PIPELINE)
    assert [trial.policy for trial in selected.selection.candidates] == ["b", "d", "c", "a"]
    assert engine.ran[:2] == [(100_000, 3), (100_001, 3)]
    learned = [arm.arm for arm in selected.evaluation.arms if arm.group == "learned"]
    assert learned == [selected.selection.winner]
    live = {trial.policy: trial.live_return for trial in selected.selection.candidates[:3]}
    assert live[selected.selection.winner] == max(live.values())
    written = json.loads((context.folder / "selection.json").read_text())
    assert written["winner"] == selected.selection.winner
    page = selected.page.read_text()
    assert f"**{selected.selection.winner}**" in page
    assert page.count("not tried") == 1
    assert (context.folder / "evaluation.md").read_text() in page
