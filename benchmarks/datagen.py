"""Data generation end to end: a matrix to a sealed version, store included, in this process.

The reference is the textbook loop: for every episode one host after another through a DataLoader, training and
validation, nothing grown, nothing probed, no control, nothing stored. A round runs one such episode.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import cases
from benchmarks.common import Comparison, options, show, since, started, timed, write
from benchmarks.plans import ENVIRONMENT
from esper.leyline.library import load_environment
from esper.leyline.specs import EnvironmentSpec
from esper.tolaria.tasks import load_task
from flows.datagen import DatagenRequest, run_datagen
from flows.orchestration import LocalOrchestrator
from flows.planning import Selection
from tests.oracles import plain_loop as plain

NAME = "datagen"

MATRIX = """
name = "benchmark"
[[cells]]
environment = "{environment}"
reward = "{environment}"
explorers = 16
replicates = 1
first_replicate = {replicate}
"""

SMALLEST = Selection(behaviours=("baseline", "schedule-sampler"), epsilons=(0.0,), max_epochs=2)


def generate(folder: Path, replicate: int, selection: Selection | None) -> int:
    """Generate and seal a row of 31 with 16 explorers, or a part of it; return the number of episodes."""
    matrix = folder / f"{NAME}-{replicate}.toml"
    matrix.write_text(MATRIX.format(environment=ENVIRONMENT, replicate=replicate), encoding="utf-8")
    store = tempfile.mkdtemp(dir=folder)
    request = DatagenRequest(matrix=str(matrix), store=store, workers=0, selection=selection)
    return run_datagen(request, LocalOrchestrator(1)).new_episodes


def plain_episode(environment: EnvironmentSpec) -> None:
    """Train and validate one host for the whole horizon."""
    data = load_task(environment.task)
    network = cases.plain_network(environment, data, cases.new_lineage(environment, data))
    optimiser = cases.plain_optimiser(environment, list(network.parameters()))
    batches = plain.endless(plain.loader(data.train.inputs, data.train.labels, environment.batch_size))
    held_out = plain.held_out(data.val_epoch.inputs, data.val_epoch.labels, environment.batch_size)
    for _ in range(environment.horizon):
        plain.train(network, optimiser, batches, environment.batches_per_epoch)
        plain.validate(network, held_out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure seconds per episode of digits-gap."""
    chosen = options(__doc__ or "", rounds=2, arguments=arguments)
    environment, selection = load_environment(ENVIRONMENT), SMALLEST if chosen.quick else None
    if chosen.quick:
        environment = environment.model_copy(update={"horizon": SMALLEST.max_epochs})
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        episodes = generate(folder, chosen.rounds, SMALLEST)  # warm up
        for replicate in range(chosen.rounds):
            theirs = timed(partial(plain_episode, environment))
            begin = started()
            episodes = generate(folder, replicate, selection)
            pairs.append((theirs, since(begin).part(episodes)))
    compared = Comparison(tuple(theirs for theirs, _ in pairs), tuple(ours for _, ours in pairs))
    record = compared.record(NAME, f"{ENVIRONMENT}, {episodes} episodes a cohort", "CPU s per episode")
    record["episodes_per_cpu_s"] = 1 / float(str(record["esper"]))
    show(record)
    write(NAME, [record], chosen.output)


if __name__ == "__main__":
    main()
