"""Every environment that ships for CIFAR-10 runs, at a small width, on made-up photographs of its layout."""

from __future__ import annotations

import numpy as np
import pytest
from engine_specs import THIRTEEN
from image_files import write_cifar

from esper.leyline.controller_specs import ELEVEN_BEHAVIOURS, FixedSchedule, NeverAct, Plant
from esper.leyline.library import load_environment, load_reward_of
from esper.leyline.matrix import CohortPlan, MatrixSpec, PlannedEpisode
from esper.leyline.plans import expand
from esper.tolaria.rollout import run_cohort

PRESETS = [
    "cifar10",
    "cifar10-deep",
    "cifar-baseline",
    "cifar-impaired",
    "cifar-minimal",
    "cifar16-gap",
    "cifar16-real",
]
NARROWEST = 4


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A data folder with 60 + 20 random images in the layout of the Hugging Face hub."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder / "cifar10")
    return folder


def small(name, **changes):
    """The environment with two epochs of two small batches, a few rows and a narrow host."""
    spec = load_environment(name)
    first = 64 if spec.host.kind == "resnet" else spec.host.channels[0]
    return spec.model_copy(
        update={
            "task": spec.task.model_copy(update={"rows": (36, 12, 12), "val_rows_per_epoch": 8}),
            "host": spec.host.model_copy(update={"width_factor": min(1.0, NARROWEST / first)}),
            "batch_size": 8,
            "batches_per_epoch": 2,
            "horizon": 2,
            **changes,
        }
    )


def run(name, monkeypatch, photographs):
    monkeypatch.setenv("ESPER_DATA", str(photographs))
    grows = FixedSchedule(name="one", plants=(Plant(slot=1, blueprint="conv_light"),))
    episodes = tuple(PlannedEpisode(controller=controller) for controller in (NeverAct(), grows))
    environment = small(name)
    plan = CohortPlan(environment=environment, reward=load_reward_of(name), replicate=0, episodes=episodes)
    return environment, run_cohort(plan)


@pytest.mark.parametrize("name", [*THIRTEEN, *PRESETS])
def test_it_runs_two_epochs_with_and_without_a_seed(name, monkeypatch, photographs):
    environment, tables = run(name, monkeypatch, photographs)
    episodes, steps = tables["episodes"].to_pandas(), tables["steps"].to_pandas()
    assert list(episodes.outcome) == ["completed", "completed"]
    assert episodes.final_test_accuracy.between(0, 1).all()
    assert len(steps) == 2 * (environment.horizon + 1)
    decided = steps[~steps.is_last]
    assert sorted(decided.op.value_counts().items()) == [("ADVANCE", 1), ("GERMINATE", 1), ("WAIT", 2)]
    assert np.isfinite(steps.val_loss.astype(float)).all()
    assert set(episodes.data_source) == {"CIFAR-10 (PNG Parquet)"}


@pytest.mark.parametrize(("name", "num_slots"), [("resnet18", 4), ("deep", 5)])
def test_the_eleven_behaviours_run_on_hosts_with_more_than_three_slots(name, num_slots, monkeypatch, photographs):
    monkeypatch.setenv("ESPER_DATA", str(photographs))
    environment = small(name, horizon=8, batches_per_epoch=1)
    assert environment.host.num_slots == num_slots
    episodes = tuple(
        PlannedEpisode(controller=controller, epsilon=1.0 if label == "random" else 0.2)
        for label, controller in ELEVEN_BEHAVIOURS.items()
    )
    plan = CohortPlan(environment=environment, reward=load_reward_of(name), replicate=0, episodes=episodes)
    tables = run_cohort(plan)
    rows, steps = tables["episodes"].to_pandas(), tables["steps"].to_pandas()
    assert set(rows.controller) == set(ELEVEN_BEHAVIOURS)
    assert set(rows.outcome) == {"completed"}
    born = steps[steps.op == "GERMINATE"]
    assert born.behaviour_logp.between(-30, 0).all()
    assert born.action_slot.max() >= 3, "slots beyond the third must be used for this to say anything"


def test_the_story_preset_runs_and_every_episode_says_that_its_stories_are_generated():
    spec = load_environment("tinystories")
    tiny = {"task": spec.task.model_copy(update={"context": 12, "rows": (40, 16, 8)}), "horizon": 2}
    host = spec.host.model_copy(update={"width_factor": 1 / 32})
    environment = spec.model_copy(update={**tiny, "host": host, "batch_size": 8, "batches_per_epoch": 2})
    grows = FixedSchedule(name="one", plants=(Plant(slot=1, blueprint="lora"),))
    episodes = tuple(PlannedEpisode(controller=controller) for controller in (NeverAct(), grows))
    plan = CohortPlan(environment=environment, reward=load_reward_of("tinystories"), replicate=0, episodes=episodes)
    rows = run_cohort(plan)["episodes"].to_pandas()
    assert list(rows.outcome) == ["completed", "completed"]
    assert set(rows.data_source) == {"generated stories (embedded, not TinyStories)"}


def test_every_member_of_a_family_runs_from_its_cell():
    cell = {"environment": "digits-mix", "reward": "digits-mix", "replicates": 1, "behaviours": ["baseline"]}
    plans = expand(MatrixSpec.parse({"name": "m", "cells": [{**cell, "epsilons": [0.0]}]}))
    assert len(plans) == 8
    for plan in plans:
        task = plan.environment.task.model_copy(update={"sources": (40, 16, 8), "copies": (1, 1, 1)})
        changes = {"task": task, "batch_size": 8, "batches_per_epoch": 2, "horizon": 1, "warm_start_epochs": 1}
        environment = plan.environment.model_copy(update=changes)
        rows = run_cohort(plan.model_copy(update={"environment": environment}))["episodes"].to_pandas()
        assert list(rows.outcome) == ["completed"]
        assert rows.environment[0].startswith("digits-mix-")
