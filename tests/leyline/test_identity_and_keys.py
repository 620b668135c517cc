"""Seeds, ids and keyed randomness."""

from dataclasses import replace

import numpy as np
import pytest

from esper.leyline.errors import SpecError
from esper.leyline.identity import (
    EpisodeIdentity,
    Role,
    check_replicate,
    env_seed,
    extend_host_key,
    root_host_key,
    state_id,
)
from esper.leyline.keys import canonical_json, derive_seed, hex_digest, numpy_generator
from esper.leyline.library import load
from esper.leyline.matrix import CohortPlan, MatrixSpec, PlannedEpisode
from esper.leyline.plans import expand

IDENTITY = EpisodeIdentity(
    environment_id="e", env_seed=1, root="host", controller_id="c", epsilon=0.1, temperature=None, repetition=0
)


def seeds_of(matrix):
    return {(plan.environment.name, plan.replicate): plan.env_seed for plan in expand(matrix)}


def test_dropping_an_environment_changes_no_other_seed_and_no_other_episode():
    demo = load("matrices", "demo", MatrixSpec)
    alone = demo.model_copy(update={"cells": demo.cells[1:]})
    whole, part = seeds_of(demo), seeds_of(alone)
    assert part == {key: seed for key, seed in whole.items() if key in part}
    ids = {plan.environment.name: plan.episode_ids() for plan in expand(demo)}
    assert {plan.environment.name: plan.episode_ids() for plan in expand(alone)} == {
        name: found for name, found in ids.items() if name == "digits-baseline"
    }


def test_a_wider_host_keeps_the_seed_and_another_task_does_not():
    plan = expand(load("matrices", "smoke", MatrixSpec))[0]
    env = plan.environment
    wider = env.model_copy(update={"host": env.host.model_copy(update={"width_factor": 2.0})})
    assert CohortPlan(environment=wider, reward=plan.reward, replicate=0, episodes=()).env_seed == plan.env_seed
    noisier = env.model_copy(update={"task": env.task.model_copy(update={"noise_sd": 0.4})})
    assert CohortPlan(environment=noisier, reward=plan.reward, replicate=0, episodes=()).env_seed != plan.env_seed


def test_environment_seeds_of_replicates_are_distinct_and_fit_an_int64():
    seeds = [env_seed("digits", replicate) for replicate in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("role", "inside", "outside"),
    [
        (Role.DATA, [0, 99_999], [-1, 100_000, 200_000]),
        (Role.ONLINE, [0, 99_999], [100_000]),
        (Role.SELECTION, [100_000, 199_999], [99_999, 200_000]),
        (Role.EVALUATION, [200_000, 300_000], [0, 199_999]),
    ],
)
def test_each_role_owns_its_range_of_replicates(role, inside, outside):
    for replicate in inside:
        check_replicate(replicate, role)
    for replicate in outside:
        with pytest.raises(SpecError, match="never mix"):
            check_replicate(replicate, role)


def test_a_cohort_with_an_episode_outside_its_role_is_refused():
    plan = expand(load("matrices", "smoke", MatrixSpec))[0]
    episodes = (plan.episodes[0].model_copy(update={"role": Role.EVALUATION}),)
    fields = {"environment": plan.environment, "reward": plan.reward, "replicate": 0, "episodes": episodes}
    with pytest.raises(ValueError, match="replicate 0"):
        CohortPlan(**fields)


@pytest.mark.parametrize(
    "change",
    [
        {"environment_id": "f"},
        {"env_seed": 2},
        {"root": "wider"},
        {"controller_id": "d"},
        {"epsilon": 0.2},
        {"temperature": 1.0},
        {"repetition": 1},
        {"branch": ("parent", 3, ((0, 0),))},
    ],
)
def test_every_part_of_an_identity_changes_the_episode_id(change):
    assert replace(IDENTITY, **change).episode_id != IDENTITY.episode_id
    assert len(IDENTITY.episode_id) == 24


def test_planned_episodes_have_distinct_ids():
    for plan in expand(load("matrices", "demo", MatrixSpec)):
        ids = plan.episode_ids()
        assert len(set(ids)) == len(ids) == len(plan.episodes)


def test_the_identity_of_an_episode_depends_on_its_place_in_no_cohort():
    plan = expand(load("matrices", "smoke", MatrixSpec))[0]
    alone = plan.model_copy(update={"episodes": plan.episodes[-1:]})
    assert alone.episode_ids() == plan.episode_ids()[-1:]
    assert isinstance(plan.episodes[0], PlannedEpisode)


def test_host_keys_depend_on_the_order_of_events():
    root = root_host_key("e", 1, "host")
    first, second = ("advance", 3, "k"), ("advance", 4, "j")
    assert extend_host_key(extend_host_key(root, first), second) != extend_host_key(
        extend_host_key(root, second), first
    )
    assert root != root_host_key("e", 1, "wider")


def test_every_part_of_a_state_changes_its_id():
    def make(host_key="h", step=1, slots=((3, 2, "k"),), last_op=0, last_executed=True):
        return state_id(host_key, step, slots, last_op, last_executed)

    changes = [{"host_key": "g"}, {"step": 2}, {"slots": ((3, 3, "k"),)}, {"last_op": 2}, {"last_executed": False}]
    found = {make(), *(make(**change) for change in changes)}
    assert len(found) == 6


def test_equal_keys_draw_equal_numbers_and_other_keys_others():
    first = numpy_generator("plan", "pool", 3).random(4)
    np.testing.assert_array_equal(first, numpy_generator("plan", "pool", 3).random(4))
    for other in (("plan", "pool", 4), ("plan", "pool", "3"), ("planpool", 3)):
        assert not np.array_equal(first, numpy_generator(*other).random(4))


def test_keys_do_not_depend_on_the_global_generator():
    np.random.seed(1)
    first = derive_seed("a", 1, None, [1, "b"])
    np.random.seed(2)
    assert derive_seed("a", 1, None, [1, "b"]) == first
    assert 0 <= first < 2**63


def test_canonical_json_has_one_spelling_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    assert hex_digest({"b": 1, "a": 2}) == hex_digest({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
