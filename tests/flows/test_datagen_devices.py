from __future__ import annotations

import pytest
import tiny

from esper.cli.datagen import datagen
from esper.cli.launch import launch, workers_for
from esper.leyline.errors import SpecError
from flows.context import RunOptions
from flows.datagen import DatagenRequest, run_datagen
from flows.orchestration import LocalOrchestrator
from flows.planning import plan_matrix, under_numerics


@pytest.fixture
def library(tmp_path, monkeypatch):
    tiny.write_library(tmp_path, replicates=2, horizon=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_as_many_workers_as_devices():
    assert RunOptions(devices=("cpu", "cpu", "cpu")).workers == 3
    assert RunOptions(devices=("cpu", "cpu"), workers=2).workers == 2
    assert RunOptions().workers == 1
    assert workers_for(None, ["cpu", "cpu"]) is None
    assert workers_for(None, None) >= 1
    with pytest.raises(SpecError, match="4 workers on 2 devices; leave workers out, or name as many"):
        RunOptions.parse({"devices": ("cpu", "cpu"), "workers": 4})
    with pytest.raises(SpecError, match="devices"):
        RunOptions.parse({"devices": ()})


def test_two_cpu_slots_give_the_digest_of_a_run_in_process(library):
    def digest(store, **slots):
        request = DatagenRequest(matrix="tiny", store=str(library / store), **slots)
        return run_datagen(request, LocalOrchestrator(request.workers)).version.manifest.digest

    assert digest("two", devices=("cpu", "cpu")) == digest("one", workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": ("cuda:99",)}, "no cuda:99 on this machine"),
        ({"devices": ("tpu",)}, "unknown device 'tpu'"),
        ({"numerics": "cuda-fp32"}, "environment 'tiny' under numerics 'cuda-fp32' cannot run on cpu"),
        ({"numerics": "cuda-bf16", "devices": ("cpu",)}, "'cuda-bf16' cannot run on cpu\n  expected: --devices"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(library, changes, message):
    request = DatagenRequest(matrix="tiny", store=str(library / "store"), **changes)
    with pytest.raises(SpecError, match=message):
        launch("datagen", request, run_datagen, prefect=False)
    assert not (library / "store").exists()


def test_on_gpus_the_environments_run_under_cuda_fp32_unless_told_otherwise(library):
    _, plans = plan_matrix("tiny")

    def numerics(devices, wanted=None):
        return [plan.environment.numerics for plan in under_numerics(plans, devices, wanted)]

    assert numerics(None) == numerics(["cpu", "cpu"]) == ["cpu-fp32"] * 2
    assert under_numerics(plans, ["cpu"]) == plans
    assert numerics(["cuda:0", "cuda:0"]) == ["cuda-fp32"] * 2
    assert numerics(["cuda:1"], "cuda-bf16") == ["cuda-bf16"] * 2
    declared = under_numerics(plans, ["cuda:0"], "cuda-tf32")
    assert under_numerics(declared, ["cuda:0"]) == declared
    with pytest.raises(SpecError, match="'cpu-fp32' cannot run on cuda:0"):
        under_numerics(plans, ["cuda:0"], "cpu-fp32")
    with pytest.raises(SpecError, match="'cuda-tf32' cannot run on cpu"):
        under_numerics(declared, None)


def test_the_workers_of_a_pool_decide_the_numerics_and_those_of_pool_gpu_are_gpus(library):
    def numerics(**changes):
        _, plans = DatagenRequest(matrix="tiny", **changes).plan()
        return {plan.environment.numerics for plan in plans}

    assert numerics(pool="cpu") == numerics(pool="a100") == {"cpu-fp32"}
    assert numerics(pool="gpu") == {"cuda-fp32"}
    assert numerics(pool="gpu", numerics="cuda-bf16") == numerics(pool="a100", numerics="cuda-bf16") == {"cuda-bf16"}
    with pytest.raises(SpecError, match="'cpu-fp32' cannot run on cuda:0"):
        numerics(pool="gpu", numerics="cpu-fp32")
    with pytest.raises(SpecError, match="devices of their own"):
        DatagenRequest.parse({"matrix": "tiny", "pool": "gpu", "devices": ("cuda:0",)})


def test_runs_on_gpus_are_paired_with_those_on_the_cpu_and_have_ids_of_their_own(library):
    _, plans = plan_matrix("tiny")
    for here, there in zip(plans, under_numerics(plans, ["cuda:0"]), strict=True):
        assert here.env_seed == there.env_seed
        assert not {*here.planned_ids()} & {*there.planned_ids()}


def test_a_dry_run_states_the_memory_of_a_worker_and_runs_nothing(library, capsys):
    datagen(
        matrix="tiny", store=str(library / "store"), devices=["cpu", "cpu"], max_lineages=2, dry_run=True, memory=True
    )
    said = capsys.readouterr().out
    assert "memory of a worker, at most, MB" in said
    assert "(x 2 workers)" in said
    assert "(3 at once)" in said
    assert said.endswith("the same command without --dry-run runs it\n")
    assert not (library / "store").exists()
