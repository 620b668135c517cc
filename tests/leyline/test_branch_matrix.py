"""Branchings in a matrix: what is refused, what they plan, and that matrices without them are what they were."""

from __future__ import annotations

import numpy as np
import pytest

from esper.leyline.actions import Action, Op
from esper.leyline.errors import EsperError, SpecError, UnknownNameError
from esper.leyline.identity import EpisodeIdentity
from esper.leyline.library import load
from esper.leyline.matrix import CohortPlan, ForcedAction, MatrixSpec, PlannedBranch
from esper.leyline.plans import COMPLETE, expand, plan_branch
from esper.leyline.specs import EnvironmentSpec

HERE = {"environment": "digits-gap", "reward": "digits-gap", "replicate": 1}
GERMINATE = {"op": "GERMINATE", "slot": 1, "blueprint": "dilated", "tempo_epochs": 5}


def branch(**changes):
    return {**HERE, "step": 3, "action": GERMINATE, **changes}


def matrix(*branches, cells=()):
    return MatrixSpec.parse({"name": "m", "cells": list(cells), "branches": list(branches)})


def test_a_matrix_without_branches_keeps_its_id_and_its_plans():
    demo = load("matrices", "demo", MatrixSpec)
    assert demo.spec_id == "0c4c559fe0273c7c"
    assert all(plan.branches == () for plan in expand(demo))


def test_branches_are_part_of_the_id():
    assert len({matrix(branch()).spec_id, matrix(branch(step=4)).spec_id}) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"action": {"op": "GERMINAT"}}, "op"),
        ({"action": {"op": "GERMINATE", "slot": 0, "blueprint": "conv_heavi"}}, "did you mean 'conv_heavy'"),
        ({"action": {"op": "GERMINATE", "slot": 0}}, "blueprint"),
        ({"action": {"op": "PRUNE"}}, "PRUNE needs a slot"),
        ({"action": {"op": "WAIT", "slot": 0}}, "WAIT reads no slot"),
        ({"action": {"op": "ADVANCE", "slot": 0, "tempo_epochs": 3}}, "ADVANCE does not read tempo_epochs"),
        ({"action": {**GERMINATE, "seed_lr_factor": 3.0}}, "seed_lr_factor"),
        ({"parent": {"controller": "basline"}}, "did you mean 'baseline'"),
        ({"parent": {"controller": "complete"}}, "goes on after a branching"),
        ({"parent": {"controller": "schedule-sampler"}}, "needs a pool"),
        ({"then": {"controller": "schedule-sampler", "pool": "demo"}}, "cannot go on"),
        ({"replicate": 100_000}, "replicate"),
    ],
)
def test_branches_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(EsperError, match=words):
        matrix(branch(**wrong))


def test_a_forced_germination_names_a_blueprint_of_the_environments_topology():
    planned = plan_branch(matrix(branch()).branches[0], load("environments", "digits-gap", EnvironmentSpec))
    assert planned.forced[0][2] == 5
    ours = ForcedAction.model_validate({**GERMINATE, "blueprint": "gated_mlp"})
    assert ForcedAction.of_row(ours.to_row("transformer"), "transformer").blueprint == "gated_mlp"
    with pytest.raises(UnknownNameError, match="its counterpart there is 'dilated'"):
        ours.to_row("cnn")


def test_a_branch_named_twice_and_two_rewards_of_an_environment_are_refused():
    with pytest.raises(SpecError, match="named twice"):
        matrix(branch(), branch())
    with pytest.raises(SpecError, match="two rewards"):
        matrix(branch(), branch(step=4, reward="digits-baseline"))


@pytest.mark.parametrize(
    ("wrong", "words"), [({"step": 20}, "step 20"), ({"action": {**GERMINATE, "slot": 3}}, "slot 3")]
)
def test_a_step_or_slot_that_the_environment_does_not_have_is_refused(wrong, words):
    with pytest.raises(SpecError, match=words):
        expand(matrix(branch(**wrong)))


def test_a_forced_action_in_words_and_its_row_are_the_same():
    action = ForcedAction.model_validate(GERMINATE)
    row = Action(op=Op.GERMINATE, slot=1, blueprint=5, tempo_epochs=5).to_row()
    assert action.to_row("cnn").tolist() == row.tolist()
    assert ForcedAction.of_row(row, "cnn").to_row("cnn").tolist() == row.tolist()
    for op in ("ADVANCE", "FOSSILIZE", "PRUNE"):
        forced = ForcedAction(op=op, slot=2)
        assert ForcedAction.of_row(forced.to_row("cnn"), "cnn") == forced
    assert ForcedAction.of_row(ForcedAction(op="WAIT").to_row("cnn"), "cnn") == ForcedAction(op="WAIT")


def test_branches_join_the_cohort_of_their_replicate_and_their_parents_are_planned_once():
    cell = {**HERE, "behaviours": ["baseline", "random"], "epsilons": [0.1], "replicates": 2}
    cell.pop("replicate")
    known = branch(parent={"controller": "baseline", "epsilon": 0.1})
    plans = expand(matrix(known, branch(), branch(step=9), branch(replicate=7), cells=[cell]))
    assert [(plan.replicate, len(plan.episodes), len(plan.branches)) for plan in plans] == [
        (0, 2, 0),
        (1, 3, 3),
        (7, 1, 1),
    ]
    names = [episode.controller.name for episode in plans[1].episodes]
    assert names == ["baseline", "random", "never-act"]
    assert all(planned.then.controller == COMPLETE for planned in plans[1].branches)
    assert CohortPlan.model_validate_json(plans[1].model_dump_json()) == plans[1]


def test_a_parent_has_the_identity_that_its_cell_gave_it():
    cell = {**HERE, "behaviours": ["random"], "explorers": 3, "replicates": 2}
    cell.pop("replicate")
    explorer = branch(parent={"controller": "schedule-sampler", "pool": "m", "repetition": 2})
    plans = expand(matrix(branch(parent={"controller": "random"}), explorer, cells=[cell]))
    assert [len(plan.episodes) for plan in plans] == [4, 4]


def test_the_id_of_a_branch_holds_its_parent_step_actions_and_successor():
    plan = expand(matrix(branch()))[0]
    planned = plan.branches[0]
    ids = {plan.branch_identity(planned).episode_id}
    for change in ({"step": 4}, {"forced": ((0,) * 8,)}, {"then": planned.parent}):
        ids.add(plan.branch_identity(planned.model_copy(update=change)).episode_id)
    assert len(ids) == 4
    identity = plan.branch_identity(planned)
    assert isinstance(identity, EpisodeIdentity)
    assert identity.branch == (plan.episode_ids()[0], 3, planned.forced)
    assert plan.planned_ids() == [*plan.episode_ids(), identity.episode_id]


def test_a_planned_branch_holds_canonical_rows_alone():
    plan = expand(matrix(branch()))[0]
    wrong = np.zeros(8, dtype=int)
    wrong[1] = 2
    fields = plan.branches[0].model_dump()
    with pytest.raises(SpecError, match="not a canonical row"):
        PlannedBranch.parse({**fields, "forced": [wrong.tolist()]})
