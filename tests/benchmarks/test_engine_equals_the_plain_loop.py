"""One training step of the engine against the textbook loop's, per host family, in float64 and float32."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases
from esper.tolaria.executor import batches, train_epoch
from esper.tolaria.runtime import single_thread
from esper.tolaria.tasks import TaskData
from tests.oracles import plain_loop as plain

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}

FAMILIES = {
    "tiny digits": cases.case("4/8/16 k311 at 1x12x12"),
    "digits": cases.case("8/16/32 at 1x8x8"),
    "colour images": cases.case("8/16/32 at 3x32x32"),
    "augmented colour images": cases.case("8/16/32 at 3x32x32, crop and flip"),
    "residual": cases.OTHERS[0],
    "decoder": cases.OTHERS[1],
}


def in_precision(data: TaskData, dtype: torch.dtype) -> TaskData:
    if data.shape.kind == "text":
        return data
    train = dataclasses.replace(data.train, inputs=data.train.inputs.to(dtype))
    return dataclasses.replace(data, train=train)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_engine_is_a_step_of_the_plain_loop(family, dtype):
    single_thread()
    case = dataclasses.replace(FAMILIES[family], batch_size=16)
    environment = case.environment(batches=1)
    data = in_precision(case.data(quick=True), dtype)
    lineage = cases.new_lineage(environment, data)
    lineage.network.to(dtype)
    network = cases.plain_network(environment, data, lineage).to(dtype)
    before = [value.clone() for value in network.state_dict().values()]
    seen = list(batches(lineage, data, cases.ENV_SEED, 0))
    optimiser = cases.plain_optimiser(environment, list(network.parameters()))
    loss, accuracy = plain.train(network, optimiser, iter(seen), 1)
    metrics = train_epoch(lineage, data, cases.ENV_SEED, 0)
    assert metrics.train_accuracy == accuracy
    assert metrics.train_loss == pytest.approx(loss, rel=TOLERANCE[dtype])
    host = lineage.network.host.state_dict().values()
    after = list(network.state_dict().values())
    moved = [(end - start).abs().max() for start, end in zip(before, after) if end.is_floating_point()]
    # A gradient is a sum: where its terms cancel, it is known to within a rounding of the terms, not of itself.
    rounding = 16 * torch.finfo(dtype).eps * max(moved)
    for start, ours, theirs in zip(before, host, after, strict=True):
        if theirs.is_floating_point():
            distance = (theirs - start).abs().max()
            assert distance > 0
            allowed = TOLERANCE[dtype] * max(distance, theirs.abs().max()) + rounding
            assert (ours - theirs).abs().max() <= allowed
