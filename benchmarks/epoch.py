"""One epoch: training, validation and probes, by the engine's executor and by a textbook loop.

Without seeds both train and validate. With an incubating seed and a blended one the textbook loop does the same work
one pass after another, each from the pixels on: the host's step, the incubating seed's own pass, validation, the
blended seed's removal, and the shadow probe's two passes on batch statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from benchmarks import cases
from benchmarks.common import Record, compare, options, show, write
from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import BLENDS, ISOLATIONS, SEED_LR_FACTORS, Blend, Isolation
from esper.leyline.blueprint_names import blueprint_code
from esper.tolaria.executor import SerialExecutor
from esper.tolaria.lineage import Lineage
from tests.oracles import plain_loop as plain

NAME = "epoch"

MEASURED = (
    "8/16/32 at 3x32x32",
    "32/64/128 at 3x32x32",
    "8/16/32 at 1x8x8",
    "4/8/16 k311 at 1x12x12",
)


def measure(case: cases.Case, with_seeds: bool, rounds: int, quick: bool) -> Record:
    """Return the record of one case; an incubating seed in the first slot, a blended one in the second."""
    num_batches = 2 if quick else case.batches
    environment, data = case.environment(num_batches), case.data(quick)
    lineage = cases.new_lineage(environment, data)
    network = cases.plain_network(environment, data, lineage)
    beside, blended = _grow(lineage) if with_seeds else (None, [])
    parameters = [*network.parameters(), *(p for seed in blended for p in seed.module.parameters())]
    optimiser = cases.plain_optimiser(environment, parameters)
    own = cases.plain_optimiser(environment, list(beside.module.parameters())) if beside else None
    rows = plain.loader(data.train.inputs, data.train.labels, case.batch_size)
    val = plain.held_out(data.val_epoch.inputs, data.val_epoch.labels, case.batch_size)
    batches = plain.endless(rows)

    def textbook() -> None:
        if beside is None or own is None:
            plain.train(network, optimiser, batches, num_batches)
            plain.validate(network, val)
            return
        for _ in range(num_batches):
            batch = next(batches)
            plain.train(network, optimiser, iter([batch]), 1, blended)
            plain.train_beside(network, beside, own, *batch, environment.seed_gradient_clip)
        plain.validate(network, val, blended)
        plain.validate(network, val)
        plain.probe(network, val, blended)
        plain.probe(network, val, [*blended, beside])

    executor, epochs = SerialExecutor(), iter(range(10**9))
    compared = compare(textbook, lambda: executor.run_epoch([lineage], data, cases.ENV_SEED, next(epochs)), rounds)
    name = f"{case.name}, {'an incubating and a blended seed' if with_seeds else 'no seed'}"
    return compared.record(
        NAME, name, "CPU ms per epoch", per=1e3, num_batches=num_batches, val_rows=len(data.val_epoch)
    )


def _grow(lineage: Lineage) -> tuple[plain.PlainSeed, list[plain.PlainSeed]]:
    """Give the lineage an incubating and a blended seed; return copies of both for the textbook loop."""
    blueprint = blueprint_code("conv_light", "cnn")
    rate = SEED_LR_FACTORS.index(1.0)
    places = lineage.network.host.places
    first = lineage.incubate(SeedKey(0, blueprint, rate, 0, "own_pass", 0), cases.ENV_SEED, places[0].channels)
    key = SeedKey(1, blueprint, rate, 0, "own_pass", 0)
    lineage.incubate(key, cases.ENV_SEED, places[1].channels)
    isolation = ISOLATIONS.index(Isolation.ISOLATED)
    state = SlotState(seed=key, blend=BLENDS.index(Blend.LINEAR), tempo=0, dwell=0, isolation=isolation)
    lineage.blend_in(state, cases.ENV_SEED)
    lineage.begin_epoch(0)
    modules = (first.module, lineage.network.grafts[1].module)
    copies = [copy.deepcopy(module).to(memory_format=torch.contiguous_format) for module in modules]
    return plain.PlainSeed(0, copies[0], 1.0), [plain.PlainSeed(1, copies[1], lineage.network.grafts[1].alpha)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, without and with seeds."""
    chosen = options(__doc__ or "", rounds=3, arguments=arguments)
    records = []
    for name in MEASURED[-1:] if chosen.quick else MEASURED:
        for with_seeds in (False, True):
            records.append(measure(cases.case(name), with_seeds, chosen.rounds, chosen.quick))
            show(records[-1])
    write(NAME, records, chosen.output)


if __name__ == "__main__":
    main()
