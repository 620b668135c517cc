"""Whole runs: the outcomes of the engine and of the textbook loop are equivalent over environment seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases
from esper.leyline.library import load_environment
from esper.tolaria.cohort import Cohort
from esper.tolaria.executor import batches
from esper.tolaria.lineage import Lineage, new_network
from esper.tolaria.runtime import single_thread
from esper.tolaria.tasks import load_task
from tests.oracles import plain_loop as plain

MARGIN_POINTS = 0.5
NUM_SEEDS = 20


def engines(environment, env_seed) -> float:
    cohort = Cohort(environment, env_seed, ["host"])
    observation = cohort.reset()
    waits = np.zeros((1, 8), dtype=np.int8)
    while not cohort.done:
        observation, _ = cohort.step(waits, observation)
    return 100 * cohort.control_outcome.final_test_accuracy


def textbooks(environment, env_seed) -> float:
    """The same initial weights and order of rows, the plain loop's own arithmetic."""
    data = load_task(environment.task)
    lineage = Lineage("plain", environment, new_network(environment, env_seed, data))
    network = cases.plain_network(environment, data, lineage)
    optimiser = cases.plain_optimiser(environment, list(network.parameters()))
    for epoch in range(environment.horizon):
        for group in optimiser.param_groups:
            group["lr"] = environment.learning_rate_at(epoch)
        rows = batches(lineage, data, env_seed, epoch)
        plain.train(network, optimiser, rows, environment.batches_per_epoch)
    test = plain.held_out(data.test.inputs, data.test.labels, 500)
    return 100 * plain.validate(network, test)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-baseline"])
def test_outcomes_over_twenty_seeds_differ_by_less_than_half_a_point_both_ways(name):
    single_thread()
    environment = load_environment(name)
    difference = np.array([engines(environment, seed) - textbooks(environment, seed) for seed in range(NUM_SEEDS)])
    above = stats.ttest_1samp(difference, -MARGIN_POINTS, alternative="greater").pvalue
    below = stats.ttest_1samp(difference, MARGIN_POINTS, alternative="less").pvalue
    print(
        f"\n{name}: engine minus plain loop {difference.mean():+.3f} points, sd {difference.std(ddof=1):.3f}, "
        f"n {NUM_SEEDS}; two one-sided tests at {MARGIN_POINTS}: p {max(above, below):.2g}"
    )
    assert max(above, below) < 0.05
