from __future__ import annotations

import os

import pytest
import stand_in_devices
import torch

from esper.leyline.errors import SpecError
from esper.tolaria.workers import CohortPool, WorkerError, check_devices

NO_GPU = f"cuda:{torch.cuda.device_count()}"


def test_each_worker_takes_its_slot_which_outlives_it_and_a_device_may_have_several():
    with CohortPool(2, devices=["cpu", "cpu"]) as pool:
        answers = [pool.call(stand_in_devices.slot_and_process, 1.0) for _ in range(2)]
        found = {answer.result() for answer in answers}
        assert {device for device, _ in found} == {"cpu"}
        assert len({process for _, process in found} - {os.getpid()}) == 2
        with pytest.raises(WorkerError, match="exit code -9"):
            pool.call(stand_in_devices.die).result()
        answers = [pool.call(stand_in_devices.slot_and_process, 1.0) for _ in range(2)]
        assert {answer.result()[0] for answer in answers} == {"cpu"}


def test_every_process_has_one_device():
    with pytest.raises(SpecError, match="2 workers on 1 devices"):
        CohortPool(2, devices=["cpu"])


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["gpu"], "unknown device 'gpu'\n  expected: cpu, or cuda:N"),
        (["cuda"], "unknown device 'cuda'"),
        (["cpu", NO_GPU], f"devices cpu {NO_GPU} are of two kinds"),
        ([NO_GPU, NO_GPU], f"no {NO_GPU} on this machine\n  found: .*\n.*--devices cpu cpu"),
    ],
)
def test_a_device_that_cannot_be_used_is_named_before_anything_starts(devices, message):
    with pytest.raises(SpecError, match=message):
        check_devices(devices)
    with pytest.raises(SpecError, match=message):
        CohortPool(len(devices), devices=devices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_workers_share_a_gpu():
    with CohortPool(2, devices=["cuda:0", "cuda:0"]) as pool:
        answers = [pool.call(stand_in_devices.slot_and_process, 1.0) for _ in range(2)]
        found = {answer.result() for answer in answers}
    assert {device for device, _ in found} == {"cuda:0"}
    assert len(found) == 2
