from __future__ import annotations

import time

import pytest
import torch
from engine_specs import plan_of, tiny_environment
from oracles.small_tasks import ENV_SEED, IMAGE, TEXT, environment, random_data, small_lineage
from other_device import META, MixedDevicesError, other_device, slot_on

from esper.kasmina.lifecycle import SeedKey, SlotState
from esper.leyline.actions import BLENDS, Blend
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, behaviour
from esper.leyline.errors import SpecError
from esper.leyline.matrix import PlannedEpisode
from esper.tolaria import runtime
from esper.tolaria.checkpoint import VOCABULARY, CheckpointSpec, load_cohort
from esper.tolaria.checkpoint_parts import Packer, Unpacker
from esper.tolaria.executor import train_epoch
from esper.tolaria.probes import validate
from esper.tolaria.rollout import CohortRun, run_cohort
from esper.tolaria.tasks import load_task


def whole_life() -> list[PlannedEpisode]:
    """Seeds of several kinds, isolated and gated among them, blended, committed and pruned; and one bigger root."""
    gated = Plant(slot=1, blueprint="attention", blend="gated", isolation="isolated", tempo_epochs=3, dwell_epochs=1)
    plain = Plant(slot=0, blueprint="conv_heavy", tempo_epochs=3, dwell_epochs=1, birth_epoch=1)
    return [
        PlannedEpisode(controller=FixedSchedule(name="two", plants=(plain, gated))),
        PlannedEpisode(controller=behaviour("random"), epsilon=1.0),
        PlannedEpisode(controller=NeverAct(), root="bigger:norm"),
    ]


@pytest.mark.parametrize("changes", [{}, {"incubation": "linearised", "optimiser": "adam", "probe_shapley": True}])
def test_whole_lives_run_on_another_device_and_leave_nothing_behind_on_the_cpu(changes):
    spec = tiny_environment(horizon=8, batches_per_epoch=1, probe_pairs=True, **changes)
    with slot_on(META), other_device() as device:
        run = CohortRun.of(plan_of(whole_life(), spec), keep_snapshots=True)
        tables = run.recorder.tables("here")
    ops = {op for op in tables["steps"]["op"].to_pylist() if op}
    assert {"GERMINATE", "ADVANCE", "FOSSILIZE"} <= ops
    assert set(tables["costs"]["device"].to_pylist()) == {"meta"}
    tensors = [t for flock in (run.cohort.flock, *run.cohort.snapshots.values()) for t in all_tensors(flock)]
    assert {str(tensor.device) for tensor in tensors} == {"meta"}
    assert device.waits


def all_tensors(flock):
    for lineage in flock.lineages.values():
        yield from lineage.network.host.state_dict().values()
        for graft in lineage.network.grafts.values():
            yield from graft.parameters()
        for incubation in lineage.incubations.values():
            yield from incubation.module.parameters()
        for state in lineage.optimiser.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def test_the_stand_in_notices_a_tensor_that_stayed_on_the_cpu():
    with other_device(), pytest.raises(MixedDevicesError):
        torch.zeros(()).add_(torch.zeros((), device=META))


def busy_lineage(kind, device, **changes):
    """A lineage with a blended gated seed, an own pass and a linearised incubation."""
    spec = environment(kind, **changes)
    data = random_data(spec).to(device)
    lineage = small_lineage(spec, data)
    channels = [place.channels for place in lineage.network.host.places]
    seeds = SeedKey(0, 2, 1, 0, "own_pass", 0), SeedKey(1, 1, 1, 0, "own_pass", 0), SeedKey(1, 3, 1, 0, "linearised", 0)
    for key in seeds:
        lineage.incubate(key, ENV_SEED, channels[key.slot])
    gated = BLENDS.index(Blend.GATED)
    lineage.blend_in(SlotState(seed=seeds[0], blend=gated, tempo=0, dwell=0, isolation=0), ENV_SEED)
    lineage.begin_epoch(0)
    return lineage, data


def epoch_of(lineage, data):
    metrics = train_epoch(lineage, data, ENV_SEED, 0)
    validate(lineage, data, metrics)
    return metrics


@pytest.mark.parametrize("kind", [IMAGE, {**TEXT, "host": {**TEXT["host"], "dropout": 0.1}}], ids=["images", "text"])
def test_the_cpu_waits_for_the_device_a_fixed_number_of_times_an_epoch(kind):
    def waits(num_batches):
        with other_device() as device:
            lineage, data = busy_lineage(kind, META, batches_per_epoch=num_batches)
            device.waits.clear()
            device.moves.clear()
            epoch_of(lineage, data)
        return device

    few, many = waits(1), waits(3)
    assert few.waits == many.waits
    if kind is IMAGE:  # dropout draws its masks on the CPU, batch by batch
        assert few.moves == many.moves


def test_augmentation_moves_its_draws_once_an_epoch():
    def moves(num_batches):
        with other_device() as device:
            lineage, data = busy_lineage(IMAGE, META, batches_per_epoch=num_batches, augment="crop-flip")
            device.moves.clear()
            epoch_of(lineage, data)
        return device.moves

    assert moves(1) == moves(3)


@pytest.mark.parametrize("kind", [IMAGE, TEXT], ids=["images", "text"])
def test_an_epoch_runs_in_bfloat16_where_it_is_safe_and_stays_near_that_of_float32(kind):
    plain = epoch_of(*busy_lineage(kind, runtime.CPU))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        lineage, data = busy_lineage(kind, runtime.CPU)
        low = epoch_of(lineage, data)
    assert {weight.dtype for weight in lineage.network.parameters()} == {torch.float32}
    assert low.train_loss != plain.train_loss
    assert low.train_loss == pytest.approx(plain.train_loss, rel=0.05)
    assert low.val_loss == pytest.approx(plain.val_loss, rel=0.15)


@pytest.mark.parametrize(("numerics", "tf32"), [("cuda-fp32", False), ("cuda-tf32", True), ("cuda-bf16", False)])
@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
def test_declared_numerics_set_what_torch_may_round_and_put_it_back(numerics, tf32):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with runtime.declared_numerics(numerics, torch.device("cuda:0")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
        assert not torch.is_autocast_cache_enabled() or numerics != "cuda-bf16"
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@pytest.mark.parametrize(("numerics", "device"), [("cuda-fp32", "cpu"), ("cpu-fp32", "cuda:1")])
def test_numerics_of_another_kind_than_the_slot_are_refused_with_what_to_do(numerics, device):
    words = f"numerics '{numerics}' cannot run on {device}\n.*--devices.*--numerics"
    with pytest.raises(SpecError, match=words), runtime.declared_numerics(numerics, torch.device(device)):
        pass


def test_a_cohort_under_cuda_numerics_does_not_run_on_the_cpu():
    plan = plan_of([PlannedEpisode(controller=NeverAct())], tiny_environment(numerics="cuda-fp32"))
    with pytest.raises(SpecError, match="cannot run on cpu"):
        run_cohort(plan)


def test_other_numerics_are_another_environment_on_the_same_environment_seed():
    plans = [plan_of(whole_life(), tiny_environment(numerics=name)) for name in ("cpu-fp32", "cuda-fp32", "cuda-bf16")]
    assert len({plan.env_seed for plan in plans}) == 1
    assert len({name for plan in plans for name in plan.episode_ids()}) == 3 * len(whole_life())


def test_data_are_moved_once_and_rows_that_splits_share_stay_shared():
    task = tiny_environment().task
    data = load_task(task, META)
    assert data is load_task(task, META)
    assert (data.device, load_task(task).device) == (META, runtime.CPU)
    assert data.val_epoch.inputs.untyped_storage()._cdata == data.val.inputs.untyped_storage()._cdata
    assert (data.digest, data.train.inputs.stride()) == (load_task(task).digest, load_task(task).train.inputs.stride())


def test_initial_weights_are_drawn_from_no_device_of_the_process():
    before = torch.default_generator.get_state()
    with runtime.keyed_initialisation("key"):
        drawn = torch.randn(3)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert torch.equal(drawn, torch.randn(3, generator=runtime.torch_generator("key")))


def test_a_checkpoint_brings_a_device_s_tensors_back_to_the_slot_and_leaves_the_others_on_the_cpu():
    tensor = torch.arange(6.0).view(2, 3).t()
    card = Packer(VOCABULARY).pack(tensor)
    assert card == {"$": "tensor", "name": "t0", "strides": [1, 3]}
    stored = {"t0": tensor.contiguous(), "t1": tensor.contiguous()}
    unpacker = Unpacker(VOCABULARY, stored, META)
    back = unpacker.unpack({**card, "name": "t1", "on_slot": True})
    assert (back.device, back.stride()) == (META, (1, 3))
    assert torch.equal(unpacker.unpack(card), tensor)


with_gpu = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)


def at_first_epoch(tables):
    """Training loss after the first epoch, by controller."""
    rows = tables["steps"].select(["actor", "step", "train_loss"]).to_pylist()
    return {row["actor"]: row["train_loss"] for row in rows if row["step"] == 1}


@with_gpu
def test_a_device_follows_the_cpu_within_rounding_and_says_how_fast(device, capsys):
    episodes = [*whole_life()[:1], *whole_life()[2:]]
    cpu = run_cohort(plan_of(episodes, tiny_environment(horizon=4)))
    plan = plan_of(episodes, tiny_environment(horizon=4, numerics=f"{torch.device(device).type}-fp32"))
    with slot_on(torch.device(device)):
        CohortRun.of(plan)
        begin = time.monotonic()
        run = CohortRun.of(plan)
        wall_s = time.monotonic() - begin
    found = run.recorder.tables("here")
    with capsys.disabled():
        print(f"\n{device}: {run.cohort.num_host_epochs / wall_s:.1f} host epochs/s of digits-gap made tiny")
    assert at_first_epoch(found) == pytest.approx(at_first_epoch(cpu), rel=1e-3)
    ends = [
        {row["controller"]: row["final_test_accuracy"] for row in tables["episodes"].to_pylist()}
        for tables in (cpu, found)
    ]
    assert ends[1] == pytest.approx(ends[0], abs=0.1)


class StopHereError(Exception):
    pass


@with_gpu
def test_an_interrupted_run_goes_on_where_it_was_on_its_device(device, tmp_path):
    spec = tiny_environment(horizon=4, numerics=f"{torch.device(device).type}-fp32")
    checkpoint = CheckpointSpec(tmp_path / "run")

    def interrupt(cohort, applied):
        if cohort.step_index == 3:
            raise StopHereError

    with slot_on(torch.device(device)):
        with pytest.raises(StopHereError):
            CohortRun.of(plan_of(whole_life(), spec), checkpoint=checkpoint, watch=interrupt)
        resumed = load_cohort(checkpoint.folder)
        assert resumed.step_index == 2
        assert {str(tensor.device) for tensor in all_tensors(resumed.flock)} == {device}
        run = CohortRun.of(plan_of(whole_life(), spec), checkpoint=checkpoint)
    assert run.cohort.done
