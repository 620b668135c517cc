"""Specifications from TOML, their errors, and what a matrix plans."""

from pathlib import Path

import pytest

from esper.leyline.controller_specs import (
    ELEVEN_BEHAVIOURS,
    FixedSchedule,
    Heuristic,
    LearnedPolicy,
    Plant,
    ScheduleSampler,
    behaviour,
)
from esper.leyline.errors import EsperError, SpecError, UnknownNameError, nearest, unknown_name
from esper.leyline.grid import GridSpec
from esper.leyline.library import find, load, load_environments, names
from esper.leyline.matrix import Cell, MatrixSpec, plan_episodes
from esper.leyline.pipelines import PipelineSpec
from esper.leyline.plans import expand
from esper.leyline.rewards import RewardSpec
from esper.leyline.spec_base import read_toml
from esper.leyline.specs import CnnHost, DigitsTask, EnvironmentSpec

KINDS = {
    "matrices": MatrixSpec,
    "environments": EnvironmentSpec,
    "rewards": RewardSpec,
    "pipelines": PipelineSpec,
    "grids": GridSpec,
}
FILES = [(kind, name) for kind in KINDS for name in names(kind)]


def gap(**changes):
    data = load("environments", "digits-gap", EnvironmentSpec).model_dump(mode="json")
    return EnvironmentSpec.parse({**data, **changes})


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_every_specification_that_ships_loads_and_is_named_like_its_file(kind, name):
    spec = load(kind, name, KINDS[kind])
    assert spec.name == name
    assert KINDS[kind].parse(spec.model_dump(mode="json")) == spec


def test_every_pipeline_names_matrices_environments_and_rewards_that_exist():
    for name in names("pipelines"):
        pipeline = load("pipelines", name, PipelineSpec)
        trained = {cell.environment for cell in load("matrices", pipeline.matrix, MatrixSpec).cells}
        assert pipeline.grid is None or load("grids", pipeline.grid, GridSpec).points()
        for cell in pipeline.evaluation:
            load_environments(cell.environment)
            load("rewards", cell.reward, RewardSpec)
            assert cell.environment in trained
        assert {bounds.environment for bounds in pipeline.controls} <= {
            cell.environment for cell in pipeline.evaluation
        }


@pytest.mark.parametrize(
    ("wrong", "right", "at_top"),
    [("learning_rat", "learning_rate", True), ("horizion", "horizon", True), ("kernel", "kernels", False)],
)
def test_an_unknown_key_names_the_nearest(wrong, right, at_top):
    data = load("environments", "digits-gap", EnvironmentSpec).model_dump(mode="json")
    (data if at_top else data["host"])[wrong] = 1
    with pytest.raises(SpecError, match=f"did you mean '{right}'") as caught:
        EnvironmentSpec.parse(data, "my.toml")
    assert str(caught.value).startswith("my.toml: unknown key")
    assert caught.value.exit_code == 2


def test_an_unknown_key_of_a_cell_names_the_nearest():
    cell = {"environment": "digits-gap", "reward": "digits-gap", "replicates": 1, "explorer": 3}
    with pytest.raises(SpecError, match="did you mean 'explorers'"):
        MatrixSpec.parse({"name": "m", "cells": [cell]})


def test_a_missing_key_is_named():
    with pytest.raises(SpecError, match="'learning_rate' is missing"):
        EnvironmentSpec.parse({"name": "x"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser": "adam", "momentum": 0.5}, "momentum has no effect under adam"),
        ({"blends": []}, "must not be empty"),
        ({"tempos": [4]}, "tempos"),
        ({"dwells": []}, "dwells"),
        ({"isolations": []}, "must not be empty"),
        ({"momentum": 1.0}, "momentum"),
        ({"horizon": 0}, "horizon"),
        ({"schedule": "drops"}, "'drops' with 0 lr_drops"),
        ({"lr_drops": [[3, 0.1]]}, "'step' with 1 lr_drops"),
        ({"schedule": "drops", "lr_drops": [[3, 0.1], [3, 0.1]]}, "must rise"),
        ({"host_frozen_epochs": [4, 4]}, "a first epoch and a later end"),
        ({"isolations": ["isolated"]}, "default_isolation 'coadapt' is not among"),
        ({"slots": ["early", "middle"]}, "the host has early, mid, late"),
        ({"slots": []}, "the host has early, mid, late"),
        ({"slots": ["early", "early"]}, "names one twice"),
        ({"augment": "crop-flip"}, "is for photographs"),
        ({"host": {"kind": "transformer"}}, "a transformer host cannot learn task 'digits'"),
        ({"task": {"kind": "tinystories"}}, "a cnn host cannot learn task 'tinystories'"),
        ({"name": "Big Name"}, "name"),
    ],
)
def test_inconsistent_options_of_an_environment_are_refused(changes, words):
    with pytest.raises(SpecError, match=words):
        gap(**changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channels": (4, 8), "kernels": (3,), "pools": (1, 1)}, "kernels has 1 entries for 2 blocks"),
        ({"channels": (4,) * 7, "kernels": (3,) * 7, "pools": (1,) * 7}, "7 blocks"),
        ({"channels": (4,), "kernels": (3,), "pools": (1,), "narrowed": (9,)}, "narrowed to 9 of 4"),
        ({"channels": (4,), "kernels": (3,), "pools": (1,), "frozen": (True, False)}, "frozen has 2"),
    ],
)
def test_inconsistent_hosts_are_refused(fields, words):
    with pytest.raises(SpecError, match=words):
        CnnHost.parse(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sources": (1500, 200, 200)}, "1797"),
        ({"copies": (2, 1, 1)}, "identical"),
    ],
)
def test_inconsistent_tasks_are_refused(fields, words):
    with pytest.raises(SpecError, match=words):
        DigitsTask.parse(fields)


def test_the_id_of_a_specification_follows_its_content():
    assert gap().spec_id == load("environments", "digits-gap", EnvironmentSpec).spec_id
    assert gap(horizon=21).spec_id != gap().spec_id


def test_the_path_of_a_checkpoint_has_no_part_in_its_id_but_its_digest_has():
    first = LearnedPolicy(name="iql", path="/a", digest="1")
    assert first.spec_id == LearnedPolicy(name="iql", path="/b", digest="1").spec_id
    assert first.spec_id != LearnedPolicy(name="iql", path="/a", digest="2").spec_id
    assert first.spec_id != LearnedPolicy(name="iql", path="/a", digest="1", sampled=True).spec_id


def test_caps_default_to_one_per_slot():
    assert (gap().seeds_cap, gap().fossils_cap) == (3, 3)
    assert (gap(max_seeds=2).seeds_cap, gap(max_fossils=1).fossils_cap) == (2, 1)


def test_the_step_schedule_is_a_tenth_over_the_last_thirty_percent():
    env = gap()
    assert [env.learning_rate_at(epoch) for epoch in (0, 13)] == [0.1, 0.1]
    assert [env.learning_rate_at(epoch) for epoch in (14, 19)] == pytest.approx([0.01, 0.01])
    cosine = gap(schedule="cosine")
    assert cosine.learning_rate_at(0) == pytest.approx(0.1)
    assert cosine.learning_rate_at(20) == pytest.approx(0.002)
    assert gap(schedule="constant").learning_rate_at(19) == 0.1


def test_a_row_of_the_matrix_has_31_episodes_and_47_with_16_explorers():
    demo = load("matrices", "demo", MatrixSpec)
    env = load("environments", "digits-gap", EnvironmentSpec)
    with_explorers, without = (plan_episodes(cell, env, pool="demo") for cell in demo.cells)
    assert len(without) == 31
    assert len(with_explorers) == 47
    assert [episode.epsilon for episode in without if episode.controller.name == "random"] == [1.0]
    samplers = [episode for episode in with_explorers if isinstance(episode.controller, ScheduleSampler)]
    assert [episode.repetition for episode in samplers] == list(range(16))
    assert {episode.controller.max_birth_epoch for episode in samplers} == {10}


def test_the_demo_plans_500_episodes_in_12_cohorts():
    plans = expand(load("matrices", "demo", MatrixSpec))
    assert len(plans) == 12
    assert sum(len(plan.episodes) for plan in plans) == 47 * 8 + 31 * 4 == 500


def test_repetitions_and_temperature_reach_the_episodes_of_rules():
    cell = Cell(environment="digits-gap", reward="digits-gap", replicates=1, repetitions=2, temperature=1.5)
    env = load("environments", "digits-gap", EnvironmentSpec)
    episodes = plan_episodes(cell, env, pool="x")
    assert len(episodes) == 62
    for episode in episodes:
        assert episode.temperature == (None if episode.controller.name == "random" else 1.5)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "no cells"),
        ([{"environment": "a", "reward": "a", "replicates": 1}] * 2, "two cells"),
        ([{"environment": "a", "reward": "a", "replicates": 1, "behaviours": []}], "plans no episode"),
        ([{"environment": "a", "reward": "a", "replicates": 0}], "replicates"),
        ([{"environment": "a", "reward": "a", "replicates": 1, "epsilons": [1.2]}], "epsilons"),
    ],
)
def test_matrices_that_make_no_sense_are_refused(cells, words):
    with pytest.raises(SpecError, match=words):
        MatrixSpec.parse({"name": "m", "cells": cells})


def test_a_pipeline_that_fine_tunes_what_it_does_not_train_is_refused():
    data = load("pipelines", "demo", PipelineSpec).model_dump(mode="json")
    with pytest.raises(SpecError, match="ppo_from"):
        PipelineSpec.parse({**data, "algorithms": ["bc"], "ppo_from": "iql"})


def test_there_are_eleven_behaviours_and_an_unknown_one_names_the_nearest():
    assert len(ELEVEN_BEHAVIOURS) == 11
    assert all(behaviour(name).name == name for name in ELEVEN_BEHAVIOURS)
    with pytest.raises(UnknownNameError, match="did you mean 'aggressive'"):
        behaviour("agressive")


def test_an_unknown_behaviour_in_a_matrix_names_the_nearest():
    cell = {"environment": "a", "reward": "a", "replicates": 1, "behaviours": ["basline"]}
    with pytest.raises(EsperError, match="did you mean 'baseline'"):
        MatrixSpec.parse({"name": "m", "cells": [cell]})


def test_unknown_blueprints_and_contradicting_rules_are_refused():
    with pytest.raises(SpecError, match="did you mean 'conv_heavy'"):
        Plant.parse({"slot": 0, "blueprint": "conv_heavi"})
    with pytest.raises(SpecError, match="inverted has no effect"):
        Heuristic.parse({"name": "x", "inverted": True, "period_epochs": 5})
    with pytest.raises(SpecError, match="slot"):
        FixedSchedule.parse({"name": "x", "plants": [{"slot": 6, "blueprint": "norm"}]})


def test_an_unknown_file_names_the_nearest_and_an_explicit_path_is_taken(tmp_path: Path):
    with pytest.raises(UnknownNameError, match="did you mean 'digits-gap'"):
        find("environments", "digit-gap")
    copy = tmp_path / "mine.toml"
    copy.write_text(find("environments", "digits-gap").read_text())
    assert load("environments", str(copy), EnvironmentSpec) == gap()


def test_broken_and_missing_toml_are_spec_errors(tmp_path: Path):
    broken = tmp_path / "b.toml"
    broken.write_text("name = ")
    with pytest.raises(SpecError, match="not valid TOML"):
        read_toml(broken)
    with pytest.raises(SpecError, match="cannot read"):
        read_toml(tmp_path / "none.toml")


def test_every_error_is_an_esper_error_with_an_exit_code():
    codes = {cls.__name__: cls.exit_code for cls in _all_errors(EsperError)}
    assert codes["SpecError"] == codes["UnknownNameError"] == codes["QueryError"] == 2
    assert codes["HealthError"] == 3
    assert codes["IntegrityError"] == codes["SchemaError"] == 4
    assert codes["StoreError"] == codes["CheckpointError"] == 1
    assert EsperError in {UnknownNameError.__mro__[2], EsperError}


def _all_errors(cls):
    return [cls, *(error for child in cls.__subclasses__() for error in _all_errors(child))]


def test_an_unknown_name_says_what_is_known():
    error = unknown_name("view", "v5", ["v1", "v3", "v4"])
    assert str(error) == "unknown view 'v5'; did you mean 'v4'?\n  known: v1, v3, v4"
    assert nearest("zzz", ["v1"]) is None
    assert "50 names, from n00 to n49" in str(unknown_name("x", "q", [f"n{i:02}" for i in range(50)]))
