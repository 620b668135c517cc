from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_specs import plan_of, tiny_environment
from oracles.small_tasks import IMAGE, TEXT, environment, random_data, small_lineage

from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, behaviour
from esper.leyline.library import load_environment
from esper.leyline.matrix import PlannedBranch, PlannedEpisode
from esper.tolaria.memory import _batch_bytes, _kept_bytes, cohort_memory, lineage_bytes, task_shape
from esper.tolaria.rollout import CohortRun
from esper.tolaria.tasks import load_task

HEAVY = FixedSchedule(
    name="heavy", plants=tuple(Plant(slot=slot, blueprint="conv_heavy", birth_epoch=slot) for slot in range(3))
)
EPISODES = [
    PlannedEpisode(controller=HEAVY),
    *(PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(4)),
]


def held_bytes(lineages) -> int:
    """Bytes of all that lineages hold: weights, buffers, gradients, optimiser state and last good state."""
    storages = {}

    def add(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def add_optimiser(state):
        for entries in state.values():
            for value in entries.values():
                if isinstance(value, torch.Tensor):
                    add(value)

    for lineage in lineages:
        modules = [lineage.network.host, *(each.module for each in lineage.incubations.values())]
        for graft in lineage.network.grafts.values():
            modules += [graft.module, *([graft.gate] if graft.gate is not None else [])]
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                add(tensor)
                if tensor.grad is not None:
                    add(tensor.grad)
        for optimiser in (lineage.optimiser, *(each.optimiser for each in lineage.incubations.values())):
            add_optimiser(optimiser.state)
        if lineage.good is not None:
            for tensor in lineage.good.tensors.values():
                add(tensor)
            add_optimiser(lineage.good.optimiser)
    return sum(storages.values())


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_running_cohort_holds_no_more_than_its_bound_and_not_a_tenth_of_it(optimiser):
    learning = {"optimiser": optimiser, "learning_rate": 0.01}
    plan = plan_of(EPISODES, tiny_environment(horizon=9, batches_per_epoch=1, **learning))
    held = []

    def watch(cohort, applied):
        lineages = {id(rider.lineage): rider.lineage for rider in cohort.riders} | {id(cohort.trunk): cohort.trunk}
        held.append(held_bytes(lineages.values()))

    CohortRun.of(plan, watch=watch)
    bound = cohort_memory(plan)
    assert bound.num_lineages == len(EPISODES) + 2
    assert bound.lineages_bytes / 10 < max(held) < bound.lineages_bytes


@pytest.mark.parametrize("kind", [IMAGE, TEXT], ids=["images", "text"])
def test_what_backward_keeps_is_counted_from_shapes_as_it_is_from_a_real_batch(kind):
    spec = environment(kind)
    data = random_data(spec)
    lineage = small_lineage(spec, data)
    inputs = data.train.inputs[: spec.batch_size]
    real = _kept_bytes(lambda: lineage.network.run(inputs)[0])
    counted = _batch_bytes(spec, data.shape)
    assert real < counted < 400 * real  # a validation chunk has 512 rows, a batch of these 16


def test_the_shape_of_a_task_is_known_without_its_data():
    for name in ("digits-gap", "digits-baseline"):
        task = load_environment(name).task
        assert task_shape(task) == load_task(task).shape


def test_branches_cost_the_snapshots_that_they_start_from():
    plan = plan_of(EPISODES, tiny_environment(horizon=6))
    branch = PlannedBranch(parent=EPISODES[0], step=1, forced=((0,) * 8,), then=PlannedEpisode(controller=NeverAct()))
    assert cohort_memory(plan).snapshots_bytes == 0
    copies = cohort_memory(plan.model_copy(update={"branches": (branch,)})).snapshots_bytes
    assert copies == (6 * (2 + 1) + 2) * lineage_bytes(plan.environment, task_shape(plan.environment.task))


MEASURE = """
import resource, sys
sys.path[:0] = {paths!r}
from engine_specs import plan_of, tiny_environment
from test_memory import EPISODES
from esper.tolaria.memory import cohort_memory
from esper.tolaria.rollout import run_cohort
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run_cohort(plan_of(EPISODES[:2], tiny_environment(horizon=3)))  # libraries and their workspaces
host = {{"kind": "cnn", "channels": (32, 64, 128), "kernels": (3, 3, 3), "pools": (2, 1, 2)}}
task = {{"kind": "digits", "canvas": 12, "noise_sd": 0.3, "sources": (400, 600, 600)}}
spec = tiny_environment(host=host, task=task, batch_size=128, batches_per_epoch=1, horizon=6)
plan = plan_of(EPISODES, spec)
bound, before = cohort_memory(plan), peak()
run_cohort(plan)
print(bound.total_bytes, peak() - before)
"""


@pytest.mark.slow
def test_a_process_grows_by_no_more_than_the_bound():
    here = Path(__file__).parent
    script = MEASURE.format(paths=[str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    bound, grown = map(int, done.stdout.split())
    assert bound / 10 < grown < bound
