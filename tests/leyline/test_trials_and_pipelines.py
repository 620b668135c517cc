"""Trials in a matrix, and what a pipeline may say."""

import pytest

from esper.leyline.errors import SpecError
from esper.leyline.library import load, load_environment
from esper.leyline.matrix import Cell, MatrixSpec, plan_episodes
from esper.leyline.pipelines import EvaluationCell, PipelineSpec
from flows.planning import Selection, plan_matrix

TRIALS = [{"name": f"trial-{keep}", "slots": [0, 1, 2], "keep": keep} for keep in range(3)]
EVALUATION = [{"environment": "digits-mix", "reward": "digits-mix", "env_seeds": 2, "selection_seeds": 2}]


def cell(**fields):
    base = {"environment": "digits-gap", "reward": "digits-gap", "behaviours": ["baseline"], "replicates": 1}
    return Cell.parse({**base, **fields})


def pipeline(**fields):
    return PipelineSpec.parse({"name": "mix", "matrix": "digits-mix", "evaluation": EVALUATION, **fields})


def test_trials_are_run_with_every_epsilon_and_a_greedy_one_is_not_repeated():
    planned = plan_episodes(
        cell(trials=TRIALS, epsilons=[0.0, 0.1], repetitions=2), load_environment("digits-gap"), "pool"
    )
    told = [(e.controller.name, e.epsilon, e.repetition) for e in planned if e.controller.kind == "trial"]
    assert told[:3] == [("trial-0", 0.0, 0), ("trial-0", 0.1, 0), ("trial-0", 0.1, 1)]
    assert len(told) == 9
    assert len({e.controller.spec_id for e in planned}) == 4


def test_matrices_without_trials_kept_their_ids():
    ids = {name: load("matrices", name, MatrixSpec).spec_id for name in ("demo", "smoke", "branches")}
    assert ids == {"demo": "0c4c559fe0273c7c", "smoke": "176e66ed27794127", "branches": "9b545186bc1b8826"}
    assert MatrixSpec(name="m", cells=(cell(trials=TRIALS),)).spec_id != MatrixSpec(name="m", cells=(cell(),)).spec_id


@pytest.mark.parametrize("trials", [[TRIALS[0], TRIALS[0]], [{**TRIALS[0], "name": "baseline"}]])
def test_a_trial_needs_a_name_of_its_own(trials):
    with pytest.raises(SpecError, match="names of their own"):
        cell(trials=trials)


def test_the_matrix_of_the_mix_tries_every_slot_on_every_member():
    _, plans = plan_matrix("digits-mix")
    assert len(plans) == 8 * 8
    kept = {episode.controller.keep for episode in plans[0].episodes if episode.controller.name.startswith("trial-")}
    assert kept == {0, 1, 2}
    _, some = plan_matrix("digits-mix", Selection(behaviours=("trials",), environments=("digits-mix-k311-pool211",)))
    assert len(some) == 8
    assert {episode.controller.kind for plan in some for episode in plan.episodes} == {"trial"}
    _, rules = plan_matrix("digits-mix", Selection(behaviours=("baseline",)))
    assert {episode.controller.name for plan in rules for episode in plan.episodes} == {"baseline"}


def test_a_pipeline_without_ppo_says_so_and_a_grid_allows_none():
    assert pipeline(ppo=False).ppo is None
    assert PipelineSpec.parse(pipeline(ppo=False).model_dump(mode="json")) == pipeline(ppo=False)
    assert pipeline().ppo is not None
    with pytest.raises(SpecError, match="set ppo = false"):
        pipeline(grid="offline")
    with pytest.raises(SpecError, match="not among the algorithms"):
        pipeline(algorithms=["bc"])


def test_evaluations_have_neither_bandit_nor_trials_unless_they_say_so():
    plain = EvaluationCell.parse(EVALUATION[0])
    assert (plain.bandit, plain.trials) == (None, ())
    assert EvaluationCell.parse({**EVALUATION[0], "bandit": {}}).bandit.pulls == 85
