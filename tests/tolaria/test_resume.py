from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_specs import plan_of, tiny_environment

from esper.leyline.actions import WAIT_ROW, Action, Blend, Op
from esper.leyline.controller_specs import FixedSchedule, NeverAct, Plant, ScheduleSampler, behaviour
from esper.leyline.errors import IntegrityError, SpecError
from esper.leyline.matrix import CohortPlan, PlannedBranch, PlannedEpisode
from esper.leyline.schema import deterministic_columns
from esper.leyline.stages import Stage
from esper.tolaria import checkpoint as checkpoints
from esper.tolaria.checkpoint import CARD, CheckpointSpec, load_cohort, save_cohort
from esper.tolaria.cohort import Cohort
from esper.tolaria.executor import SerialExecutor
from esper.tolaria.rollout import CohortRun, run_cohort


class StoppedError(Exception):
    pass


class StopsAt(SerialExecutor):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def run_epoch(self, lineages, data, env_seed, epoch):
        if epoch == self.epoch:
            raise StoppedError
        super().run_epoch(lineages, data, env_seed, epoch)


def gated(slot: int, blueprint: str = "conv_heavy") -> PlannedEpisode:
    plant = Plant(slot=slot, blueprint=blueprint, blend=Blend.GATED)
    return PlannedEpisode(controller=FixedSchedule(name=f"gated-{slot}", plants=(plant,)))


def mixed() -> list[PlannedEpisode]:
    sampler = ScheduleSampler(pool="test", num_plans=30, num_slots=3, max_birth_epoch=3)
    return [
        PlannedEpisode(controller=NeverAct()),
        gated(0),
        gated(2),
        *(PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(3)),
        PlannedEpisode(controller=behaviour("aggressive"), epsilon=0.3),
        PlannedEpisode(controller=sampler, repetition=2),
        PlannedEpisode(controller=NeverAct(), root="bigger:norm"),
        PlannedEpisode(controller=behaviour("random"), epsilon=1.0, root="wider:2"),
    ]


def deterministic(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    return {name: tables[name].select(deterministic_columns(name)).combine_chunks() for name in ("steps", "episodes")}


def everything_of(cohort: Cohort) -> dict[str, torch.Tensor]:
    """Every weight, buffer and optimiser entry of every lineage."""
    found = {}
    for key, lineage in cohort.flock.lineages.items():
        modules = {"host": lineage.network.host}
        for slot, graft in lineage.network.grafts.items():
            modules |= {f"graft{slot}": graft.module, f"gate{slot}": graft.gate or torch.nn.Identity()}
        optimisers = {"own": lineage.optimiser}
        for number, incubation in enumerate(lineage.incubations.values()):
            modules[f"incubation{number}"], optimisers[f"incubation{number}"] = incubation.module, incubation.optimiser
        for name, module in modules.items():
            found |= {f"{key}.{name}.{part}": value for part, value in module.state_dict().items()}
        for name, optimiser in optimisers.items():
            state = optimiser.state_dict()["state"]
            for place, entries in state.items():
                for entry, value in entries.items():
                    if isinstance(value, torch.Tensor):
                        found[f"{key}.{name}.{place}.{entry}"] = value
    return found


def assert_same(ours: CohortRun, theirs: CohortRun) -> None:
    a, b = everything_of(ours.cohort), everything_of(theirs.cohort)
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name]) or a[name].stride() != b[name].stride()] == []
    assert deterministic(ours.recorder.tables("here")) == deterministic(theirs.recorder.tables("here"))


ENVIRONMENTS = {
    "sgd": {"probe_pairs": True, "probe_shapley": True},
    "adam": {"optimiser": "adam", "learning_rate": 0.003, "incubation": "linearised", "holding_patience": 1},
    "asked": {"ask_at_every_gate": True, "schedule": "constant", "max_seeds": 2, "host_frozen_epochs": (2, 4)},
    "rolled-back": {"schedule": "drops", "lr_drops": ((3, 3000.0), (4, 1 / 3000.0))},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_cohort_that_was_interrupted_in_every_epoch_ends_byte_for_byte_as_if_it_had_not_been(name, tmp_path):
    environment = tiny_environment(horizon=7, **ENVIRONMENTS[name])
    plan, spec = plan_of(mixed(), environment), CheckpointSpec(tmp_path)
    stages, gates, incubations = set(), 0, 0
    for epoch in range(1, environment.horizon):
        with pytest.raises(StoppedError):
            CohortRun.of(plan, StopsAt(epoch), checkpoint=spec)
        stored = load_cohort(tmp_path)
        assert stored.step_index == epoch
        stages |= {slot.stage for rider in stored.riders for slot in rider.slots}
        grafts = [graft for lineage in stored.flock.lineages.values() for graft in lineage.network.grafts.values()]
        gates += sum(graft.gate is not None for graft in grafts)
        incubations += sum(len(lineage.incubations) for lineage in stored.flock.lineages.values())
    resumed, undisturbed = CohortRun.of(plan, checkpoint=spec), CohortRun.of(plan)
    assert_same(resumed, undisturbed)
    assert (undisturbed.cohort.trunk.num_rollbacks > 0) == (name == "rolled-back")
    assert min(gates, incubations) > 0
    assert {Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED, Stage.EMBARGOED} <= stages


HOSTS = {
    "transformer": {
        "task": {"kind": "tinystories", "context": 12, "vocabulary": 64, "rows": (48, 16, 16)},
        "host": {"kind": "transformer", "layers": 2, "heads": 2, "embed": 16, "dropout": 0.2, "slots": 2},
    },
    "resnet": {"host": {"kind": "resnet", "layers": 18, "width_factor": 0.0625}, "default_isolation": "isolated"},
}


@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_go_on_byte_for_byte_too(name, tmp_path):
    environment = tiny_environment(**{**HOSTS[name], "batch_size": 8, "batches_per_epoch": 2})
    episodes = [PlannedEpisode(controller=behaviour("random"), epsilon=1.0, repetition=r) for r in range(3)]
    plan, spec = plan_of([*episodes, gated(1, "attention")], environment), CheckpointSpec(tmp_path)
    for epoch in (2, 4):
        with pytest.raises(StoppedError):
            CohortRun.of(plan, StopsAt(epoch), checkpoint=spec)
    resumed = CohortRun.of(plan, checkpoint=spec)
    assert len(resumed.cohort.flock.lineages) > 2
    assert_same(resumed, CohortRun.of(plan))


def test_branches_leave_a_resumed_run_as_they_leave_an_undisturbed_one(tmp_path):
    trunk, random = PlannedEpisode(controller=NeverAct()), PlannedEpisode(controller=behaviour("random"), epsilon=1.0)
    forced = (tuple(Action(op=Op.GERMINATE, slot=1, blueprint=7).to_row().tolist()),)
    branches = (PlannedBranch(parent=trunk, step=2, forced=forced, then=trunk),)
    plan = plan_of([trunk, random], tiny_environment()).model_copy(update={"branches": branches})
    spec = CheckpointSpec(tmp_path / "run", every_epochs=2)
    running = plan.model_copy(update={"branches": ()})
    with pytest.raises(StoppedError):
        CohortRun.of(running, StopsAt(5), keep_snapshots=True, checkpoint=spec)
    assert deterministic(run_cohort(plan, spec)) == deterministic(run_cohort(plan))
    assert not spec.folder.exists()


LONG = {"horizon": 10, "batches_per_epoch": 4}


def long_plan() -> CohortPlan:
    return plan_of(mixed()[1:4], tiny_environment(**LONG))


def test_a_process_killed_in_mid_run_goes_on_where_it_was_and_ends_the_same(tmp_path):
    folder = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from test_resume import long_plan; "
        "from esper.tolaria.checkpoint import CheckpointSpec; from esper.tolaria.rollout import run_cohort; "
        "run_cohort(long_plan(), CheckpointSpec(Path(sys.argv[1])))"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while not (folder / CARD).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    at = load_cohort(folder).step_index
    assert 0 < at < LONG["horizon"]
    resumed = CohortRun.of(long_plan(), checkpoint=CheckpointSpec(folder))
    assert_same(resumed, CohortRun.of(long_plan()))


def planted(folder: Path) -> Cohort:
    cohort = Cohort(tiny_environment(), 11, ["host"])
    observation = cohort.reset()
    for row in (Action(op=Op.GERMINATE, slot=0, blueprint=6).to_row(), WAIT_ROW):
        observation, _ = cohort.step(np.array(row)[None], observation)
    save_cohort(cohort, folder)
    return cohort


def test_saving_changes_nothing_and_an_older_state_is_replaced_whole(tmp_path):
    cohort, twin = planted(tmp_path / "a"), planted(tmp_path / "b")
    for each in (cohort, twin):
        each.step(WAIT_ROW[None], each.observe())
        if each is cohort:
            save_cohort(each, tmp_path / "a")
        each.step(WAIT_ROW[None], each.observe())
    ours, theirs = everything_of(cohort), everything_of(twin)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (load_cohort(tmp_path / "a").step_index, load_cohort(tmp_path / "b").step_index) == (3, 2)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_a_kill_before_the_card_is_replaced_leaves_the_older_state(tmp_path, monkeypatch):
    cohort = planted(tmp_path)
    cohort.step(WAIT_ROW[None], cohort.observe())
    write = checkpoints._write

    def dies_at_the_card(path: Path, content: bytes) -> None:
        if path.name == CARD:
            path.with_name(f".{CARD}.1.checkpoint-tmp").write_bytes(content[:100])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", dies_at_the_card)
    with pytest.raises(KeyboardInterrupt):
        save_cohort(cohort, tmp_path)
    assert load_cohort(tmp_path).step_index == 2
    monkeypatch.undo()
    save_cohort(cohort, tmp_path)
    assert (load_cohort(tmp_path).step_index, len(list(tmp_path.iterdir()))) == (3, 2)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_truncated_file_is_an_integrity_error(tmp_path, suffix, share):
    planted(tmp_path)
    path = next(tmp_path.glob(f"*{suffix}"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(IntegrityError, match="damaged"):
        load_cohort(tmp_path)


def test_a_changed_byte_or_a_missing_file_is_an_integrity_error(tmp_path):
    planted(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(IntegrityError, match="not what was written"):
        load_cohort(tmp_path)
    tensors.unlink()
    with pytest.raises(IntegrityError):
        load_cohort(tmp_path)


def test_no_checkpoint_another_engine_another_plan_and_other_data_are_named_errors(tmp_path, monkeypatch):
    with pytest.raises(SpecError, match="no checkpoint"):
        load_cohort(tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        CohortRun.of(plan_of([gated(0)]), StopsAt(2), checkpoint=CheckpointSpec(folder))
    with pytest.raises(SpecError, match="another plan"):
        CohortRun.of(plan_of([gated(1)]), checkpoint=CheckpointSpec(folder))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "ENGINE_VERSION", "other")
        with pytest.raises(SpecError, match="another version"):
            load_cohort(folder)
    card = json.loads((folder / CARD).read_text())
    card["state"]["data_digest"] = "0" * 16
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(IntegrityError):
        load_cohort(folder)
    with pytest.raises(SpecError, match="1 or more"):
        CheckpointSpec(folder, 0)


def test_a_checkpoint_is_json_and_safetensors_and_nothing_else(tmp_path):
    planted(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    kinds = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            kinds.add(value.get("$"))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(json.loads((tmp_path / CARD).read_text())["state"]["flock"]["lineages"][0]["plain"])
    assert kinds <= {None, "dict", "tuple", "float", "enum", "array", "tensor", "record", "strings"}
