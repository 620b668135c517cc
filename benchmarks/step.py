"""One training step: the engine's epoch loop against a textbook DataLoader loop, per host family and size.

Both train the same network from the same weights with the same maths; what differs is how. A round trains a number of
batches each; Esper's are `train_epoch`'s, with its index batches, augmentation, optimiser and reading at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import cases
from benchmarks.common import Record, compare, options, show, write
from esper.tolaria.executor import train_epoch
from tests.oracles import plain_loop as plain

NAME = "step"


def measure(case: cases.Case, rounds: int, quick: bool) -> Record:
    """Return the record of one case."""
    num_batches = 2 if quick else case.batches
    environment, data = case.environment(num_batches), case.data(quick)
    lineage = cases.new_lineage(environment, data)
    network = cases.plain_network(environment, data, lineage)
    optimiser = cases.plain_optimiser(environment, list(network.parameters()))
    rows = plain.loader(data.train.inputs, data.train.labels, case.batch_size, case.augmented)
    batches, epochs = plain.endless(rows), iter(range(10**9))
    compared = compare(
        lambda: plain.train(network, optimiser, batches, num_batches),
        lambda: train_epoch(lineage, data, cases.ENV_SEED, next(epochs)),
        rounds,
    )
    return compared.record(NAME, case.name, "CPU ms per step", per=1e3 / num_batches, batch_size=case.batch_size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case."""
    chosen = options(__doc__ or "", rounds=9, arguments=arguments)
    records = []
    for case in (cases.IMAGES[6], cases.OTHERS[1]) if chosen.quick else cases.ALL:
        records.append(measure(case, chosen.rounds, chosen.quick))
        show(records[-1])
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
