from __future__ import annotations

from pathlib import Path

import pytest
from engine_specs import THIRTEEN

from esper.leyline.errors import SpecError, UnknownNameError
from esper.leyline.families import FamilySpec
from esper.leyline.identity import env_seed
from esper.leyline.library import (
    find,
    load,
    load_environment,
    load_environments,
    load_reward_of,
    names,
)
from esper.leyline.matrix import MatrixSpec
from esper.leyline.plans import expand
from esper.leyline.specs import EnvironmentSpec


def family(**changes):
    data = load("families", "digits-mix", FamilySpec).model_dump(mode="json", exclude_none=True)
    return FamilySpec.parse({**data, **changes})


def cell(environment, **changes):
    common = {"reward": "digits-mix", "replicates": 2, "behaviours": ["baseline"], "epsilons": [0.0]}
    return {"environment": environment, **common, **changes}


def test_digits_mix_has_the_eight_hosts_of_the_study_and_one_fossil():
    members = load_environments("digits-mix")
    hosts = [(m.host.kernels, m.host.pools, m.host.narrowed, m.host.frozen) for m in members]
    assert hosts == [
        ((3, 1, 1), (2, 2, 2), (), ()),
        ((3, 1, 1), (2, 1, 1), (), ()),
        ((3, 1, 1), (1, 2, 2), (), ()),
        ((3, 1, 1), (2, 2, 2), (1, 0, 0), ()),
        ((3, 1, 1), (2, 2, 2), (0, 1, 0), ()),
        ((3, 3, 3), (2, 2, 2), (0, 1, 0), ()),
        ((3, 3, 3), (2, 2, 2), (), (False, True, False)),
        ((3, 3, 3), (2, 2, 2), (), (False, False, True)),
    ]
    assert {m.fossils_cap for m in members} == {1}
    assert members[0].host == load_environment("digits-gap").host


def test_members_differ_in_name_and_host_alone_and_share_environment_seeds():
    members = load_environments("digits-mix")
    assert len({m.id_without("name", "host") for m in members}) == 1
    assert len({m.name for m in members}) == 8
    assert len({env_seed(m.task.task_id, 3) for m in (*members, load_environment("digits-gap"))}) == 1


def test_drawn_hosts_are_distinct_and_a_smaller_family_is_the_beginning_of_a_larger_one():
    members = load_environments("digits-random")
    assert len({m.host for m in members}) == len(members) == 150
    spec = load("families", "digits-random", FamilySpec)
    few = spec.model_copy(update={"drawn": spec.drawn.model_copy(update={"count": 7})}).environments()
    assert few == members[:7]
    assert members[17].name == "digits-random-017"
    impaired = [sum(map(bool, m.host.narrowed)) + sum(m.host.frozen) for m in members]
    assert set(impaired) == {0, 1}
    assert len({m.host.kernels for m in members}) == len({m.host.pools for m in members}) == 6


def test_more_hosts_than_combinations_are_refused():
    spec = load("families", "digits-random", FamilySpec)
    assert len(spec.model_copy(update={"drawn": spec.drawn.model_copy(update={"count": 252})}).environments()) == 252
    with pytest.raises(SpecError, match="253 hosts drawn from 252 combinations"):
        spec.model_copy(update={"drawn": spec.drawn.model_copy(update={"count": 253})}).environments()


def test_a_shared_field_reaches_every_member():
    shared = {**load("families", "digits-mix", FamilySpec).environment, "warm_start_epochs": 20}
    assert {m.warm_start_epochs for m in family(environment=shared).environments()} == {20}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": []}, "expected \\[\\[members\\]\\] or a \\[drawn\\] table"),
        ({"drawn": {"count": 1, "kernels": [[3]], "pools": [[1]]}}, "one of the two"),
        ({"members": [{"name": "a", "kernels": [3], "pools": [1]}] * 2}, "two members have one name"),
        ({"members": [{"name": "a", "kernel": [3], "pools": [1]}]}, "did you mean 'kernels'"),
    ],
)
def test_families_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(SpecError, match=words):
        family(**changes)


def test_an_error_in_a_member_names_its_environment():
    with pytest.raises(SpecError, match=r"environment 'digits-mix-a': .*kernels has 1 entries for 3 blocks"):
        family(members=[{"name": "a", "kernels": [3], "pools": [1, 1, 1]}]).environments()
    shared = {**load("families", "digits-mix", FamilySpec).environment, "horizn": 3}
    with pytest.raises(SpecError, match="did you mean 'horizon'"):
        family(environment=shared).environments()


def test_an_environment_is_found_by_name_with_underscores_by_member_and_by_path(tmp_path: Path):
    assert load_environment("cifar_baseline") == load_environment("cifar-baseline")
    assert load_environment("digits-mix-k311-pool211").host.pools == (2, 1, 1)
    assert load_environment("digits_mix_k311_pool211").name == "digits-mix-k311-pool211"
    copy = tmp_path / "mine.toml"
    copy.write_text(find("families", "digits-mix").read_text().replace('"digits-mix"', '"mine"'))
    assert [m.name for m in load_environments(str(copy))][:1] == ["mine-k311-pool222"]
    copy.write_text(find("environments", "digits-gap").read_text())
    assert load_environment(str(copy)) == load_environment("digits-gap")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("resnet43", "resnet34"),
        ("digits-mixx", "digits-mix"),
        ("digits-mix-k311-pool221", "digits-mix-k311-pool222"),
        ("digits-random-151", "digits-random-1"),
    ],
)
def test_an_unknown_name_is_compared_with_environments_families_and_members(wrong, near):
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}"):
        load_environment(wrong)


def test_a_whole_family_is_no_environment():
    with pytest.raises(SpecError, match=r"of 8 environments\n  expected: one of them: .*digits-mix-k333-frozen1"):
        load_environment("digits-mix")


def test_a_cell_of_a_family_plans_a_row_of_cohorts_for_each_member():
    plans = expand(MatrixSpec.parse({"name": "m", "cells": [cell("digits-mix"), cell("digits-gap")]}))
    assert len(plans) == 8 * 2 + 2
    assert [plan.replicate for plan in plans[:4]] == [0, 1, 0, 1]
    assert len({episode for plan in plans for episode in plan.episode_ids()}) == 18
    with pytest.raises(SpecError, match="'digits-mix-k333-frozen1' is in two cells"):
        expand(MatrixSpec.parse({"name": "m", "cells": [cell("digits-mix"), cell("digits-mix-k333-frozen1")]}))


def test_a_branch_joins_the_cohort_of_a_member_and_shares_its_reward():
    action = {"op": "GERMINATE", "slot": 1, "blueprint": "norm"}
    branch = {"environment": "digits-mix-k333-frozen1", "reward": "digits-mix", "replicate": 1, "step": 3}
    matrix = {"name": "m", "cells": [cell("digits-mix")], "branches": [{**branch, "action": action}]}
    plans = expand(MatrixSpec.parse(matrix))
    assert len(plans) == 16
    assert [p.environment.name for p in plans if p.branches] == ["digits-mix-k333-frozen1"]
    matrix["branches"][0]["reward"] = "digits-gap"
    with pytest.raises(SpecError, match="'digits-mix-k333-frozen1' has two rewards: 'digits-mix' and 'digits-gap'"):
        expand(MatrixSpec.parse(matrix))


def test_every_environment_and_member_has_a_reward():
    for name in (*names("environments"), *(m.name for f in names("families") for m in load_environments(f))):
        assert load_reward_of(name).rent_points > 0
    assert [load("families", name, FamilySpec).name for name in names("families")] == names("families")
    assert load_reward_of("digits-random-003").name == "digits-random"
    assert load_reward_of("cifar16_real").name == "cifar16-real"
    assert load_reward_of("resnet34").name == "cifar10"


def test_the_thirteen_environments_have_the_published_settings():
    settings = {}
    for name in THIRTEEN:
        env = load_environment(name)
        assert (env.horizon, env.weight_decay, env.augment, env.schedule) == (25, 0.0, "none", "step")
        assert (env.momentum, env.task.resolution, env.isolation.value) == (0.9, 32, "isolated")
        assert env.batch_size * env.batches_per_epoch <= env.task.rows[0] < env.batch_size * (env.batches_per_epoch + 1)
        settings[name] = (env.learning_rate, env.batch_size, env.optimiser)
    assert len({load_environment(name).spec_id for name in THIRTEEN}) == 13
    assert settings == {
        **dict.fromkeys(("baseline", "wide", "deep", "resnet18", "resnet34"), (0.01, 128, "sgd")),
        "fast-lr": (0.1, 128, "sgd"),
        "slow-lr": (0.001, 128, "sgd"),
        "small-batch": (0.01, 64, "sgd"),
        "large-batch": (0.02, 256, "sgd"),
        "resnet34-slow": (0.005, 128, "sgd"),
        "resnet34-small-batch": (0.01, 64, "sgd"),
        **dict.fromkeys(("adam", "resnet34-adam"), (0.001, 128, "adam")),
    }


@pytest.mark.parametrize(
    ("name", "rate", "channels", "kernels", "rent", "scale"),
    [
        ("cifar16-gap", 0.05, (4, 8, 16), (3, 1, 1), 1.0, 2.5),
        ("cifar16-real", 0.1, (8, 16, 32), (3, 3, 3), 0.75, 0.55),
        ("cifar32-real", 0.1, (8, 16, 32), (3, 3, 3), 1.5, 1.0),
    ],
)
def test_the_measured_photograph_environments_are_as_measured(name, rate, channels, kernels, rent, scale):
    env, reward = load_environment(name), load_reward_of(name)
    assert (env.learning_rate, env.host.channels, env.host.kernels) == (rate, channels, kernels)
    assert (env.horizon, env.batches_per_epoch, env.batch_size, env.weight_decay) == (20, 20, 128, 5e-4)
    assert (env.task.rows, env.task.val_rows_per_epoch) == ((5000, 5000, 10_000), 1000)
    assert env.task.resolution == int(name[5:7])
    assert (env.isolation.value, reward.rent_points, reward.scale_points) == ("coadapt", rent, scale)


def test_the_presets_have_the_settings_of_the_concept_documents():
    for name in ("cifar10", "cifar10-deep", "cifar-baseline", "cifar-impaired", "cifar-minimal"):
        env = load_environment(name)
        assert (env.optimiser, env.learning_rate, env.batch_size) == ("sgd", 0.01, 128)
        assert (env.momentum, env.weight_decay, env.task.resolution) == (0.9, 5e-4, 32)
        assert env.augment == ("crop-flip" if name == "cifar10" else "none")
    stories = load_environment("tinystories")
    assert (stories.optimiser, stories.learning_rate, stories.batch_size) == ("sgd", 0.01, 32)
    assert (stories.host.layers, stories.host.heads, stories.host.embed, stories.host.dropout) == (6, 6, 384, 0.1)
    assert (stories.isolation.value, stories.task.source) == ("coadapt", "embedded")


@pytest.mark.parametrize(
    ("name", "channels", "kernels", "batch_size", "rows", "rent"),
    [
        ("digits-gap", (4, 8, 16), (3, 1, 1), 128, (2000, 1188, 4000), 3.0),
        ("digits-baseline", (8, 16, 32), (3, 3, 3), 64, (1000, 297, 500), 3.0),
        ("digits-mix-k311-pool222", (4, 8, 16), (3, 1, 1), 128, (2000, 1188, 4000), 1.0),
        ("digits-random-000", (4, 8, 16), None, 128, (2000, 1188, 4000), 1.0),
    ],
)
def test_the_measured_digits_environments_are_as_measured(name, channels, kernels, batch_size, rows, rent):
    env, reward = load_environment(name), load_reward_of(name)
    assert (env.learning_rate, env.weight_decay, env.momentum, env.schedule) == (0.1, 5e-4, 0.9, "step")
    assert (env.horizon, env.batches_per_epoch, env.batch_size) == (20, 15, batch_size)
    assert tuple(source * copies for source, copies in zip(env.task.sources, env.task.copies)) == rows
    assert env.host.channels == channels
    assert kernels is None or env.host.kernels == kernels
    assert (env.isolation.value, reward.rent_points, reward.scale_points) == ("coadapt", rent, 9.0)


def test_environments_of_one_task_share_environment_seeds_whatever_their_host_and_batch():
    seeds = {env_seed(load_environment(name).task.task_id, 0) for name in THIRTEEN}
    assert len(seeds) == 1
    assert isinstance(load_environment("tinystories"), EnvironmentSpec)
