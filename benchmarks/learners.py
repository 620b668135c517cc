"""Gradient steps of the offline learners against d3rlpy's, with the same network on the same rows.

A flat problem with the sizes of CartPole (4 numbers, 2 actions) is written in the tree, where the shipped learners
solve it unchanged, and handed to d3rlpy as it is. Both train two hidden layers on batches of 256. Esper's half of a
round is a whole call of the learner, from making its networks to the policy that it returns; d3rlpy's is sampling and
updating alone, with an algorithm and a replay buffer made beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.common import Record, compare, options, show, write
from esper.simic import learning
from esper.simic.batches import Transitions
from esper.simic.bc import BcRecipe, fit_bc
from esper.simic.cql import CqlRecipe, fit_cql
from esper.simic.d3rlpy_backend import D3rlpyRecipe, build_algorithm
from esper.simic.d3rlpy_export import library_randomness, mdp_dataset
from esper.simic.flat_actions import FlatActions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles.flat_tree import flat_transitions, shapes

NAME = "learners"
BATCH, RATE, NUM_INPUTS, NUM_ACTIONS = 256, 3e-4, 4, 2
WIDTHS = (64, 256)


def random_episodes(num: int, length: int) -> Transitions:
    """Episodes of random numbers: what is in the rows has no part in how long a step takes."""
    rng = np.random.default_rng(0)
    return flat_transitions(
        [
            (
                rng.normal(size=(length + 1, NUM_INPUTS)),
                rng.integers(NUM_ACTIONS, size=length),
                rng.normal(size=length),
                True,
            )
            for _ in range(num)
        ],
        NUM_ACTIONS,
    )


def d3rlpy_steps(algorithm_name: str, width: int, data: Transitions, steps: int) -> Callable[[], None]:
    """Return d3rlpy's gradient steps: what its `fit` does in a step, without its log."""
    conservative = {"gamma": 0.99, "n_step": 1, "alpha": 1.0} if algorithm_name == "cql" else {}
    recipe = D3rlpyRecipe.parse(
        {
            "algorithm": algorithm_name,
            "hidden": (width, width),
            "steps": steps,
            "log_every": steps,
            "batch_size": BATCH,
            "learning_rate": RATE,
            **conservative,
        }
    )
    dataset = mdp_dataset(data, FlatActions.of(data), n_step=1, gamma=1.0)
    with library_randomness(0):
        algorithm, _ = build_algorithm(recipe)
        algorithm.build_with_dataset(dataset)

    def run() -> None:
        for _ in range(steps):
            algorithm.update(dataset.sample_transition_batch(BATCH))

    return run


def esper_steps(algorithm_name: str, width: int, data: Transitions, steps: int) -> Callable[[], None]:
    """Return Esper's learner on the same network."""
    none = data.select(np.zeros(len(data), dtype=bool))
    shared = {"steps": steps, "batch_size": BATCH, "learning_rate": RATE, "log_every": steps}
    net = shapes(NUM_INPUTS, NUM_ACTIONS, (width, width)).tree

    def run() -> None:
        with patch.object(learning, "TreeNet", net):
            if algorithm_name == "cql":
                recipe = CqlRecipe.parse(shared | {"gamma": 0.99, "n_step": 1, "alpha": 1.0, "prior": "leaves"})
                fit_cql(data, none, recipe, seed=0, on_log=lambda _: None)
            else:
                fit_bc(data, none, BcRecipe.parse(shared), seed=0, on_log=lambda _: None)

    return run


def measure(algorithm_name: str, width: int, rounds: int, quick: bool) -> Record:
    """Return the record of one learner and width."""
    steps = 5 if quick else 200
    data = random_episodes(10 if quick else 200, 90)
    compared = compare(
        d3rlpy_steps(algorithm_name, width, data, steps), esper_steps(algorithm_name, width, data, steps), rounds
    )
    record = compared.record(
        NAME,
        f"{algorithm_name} {width}x{width}",
        "CPU ms per step",
        per=1e3 / steps,
        batch_size=BATCH,
        rows=len(data),
        steps=steps,
    )
    return record | {
        f"{whose}_steps_per_s": 1e3 / cpu_ms
        for whose in ("reference", "esper")
        if isinstance(cpu_ms := record[whose], float)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case."""
    chosen = options(__doc__ or "", rounds=9, arguments=arguments)
    records = []
    for algorithm_name in ("cql", "bc"):
        for width in WIDTHS[:1] if chosen.quick else WIDTHS:
            records.append(measure(algorithm_name, width, chosen.rounds, chosen.quick))
            show(records[-1])
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
