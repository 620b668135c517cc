"""TensorBoard files, read back by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper.leyline.events import EventKind
from esper.nissa.tensorboard import TensorBoardSink
from esper.nissa.writer import EventWriter


def write(run: Path, policy: str, steps: range, offset: float = 0.0) -> None:
    sink = TensorBoardSink(run)
    with EventWriter(run, "r", (sink,)) as events:
        for step in steps:
            losses = {"policy_loss": offset + 1 / step, "held_out_policy_loss": 2.0}
            events.emit(EventKind.TRAIN_STEP, {"policy": policy, "step": float(step), **losses})
        events.emit(EventKind.TRAIN_ENDED, {"policy": policy, "wall_s": 1.0})
    sink.close()


def scalars(run: Path, policy: str) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(run / "tensorboard" / policy)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_every_loss_is_a_scalar_by_step_in_the_folder_of_its_policy(tmp_path: Path) -> None:
    write(tmp_path, "iql (values)", range(1, 3))
    write(tmp_path, "iql", range(1, 4))
    assert scalars(tmp_path, "iql") == {
        "policy_loss": [(1, 1.0), (2, 0.5), (3, 0.3333)],
        "held_out_policy_loss": [(1, 2.0), (2, 2.0), (3, 2.0)],
    }
    assert scalars(tmp_path, "iql-values")["policy_loss"] == [(1, 1.0), (2, 0.5)]


def test_a_resumed_run_shows_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, "bc", range(1, 5), offset=10.0)
    write(tmp_path, "bc", range(3, 6))
    assert scalars(tmp_path, "bc")["policy_loss"] == [(1, 11.0), (2, 10.5), (3, 0.3333), (4, 0.25), (5, 0.2)]


def test_no_policy_no_file(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    with EventWriter(tmp_path, "r", (sink,)) as events:
        events.emit(EventKind.RUN_STARTED, {"command": "train"})
    sink.close()
    assert not (tmp_path / "tensorboard").exists()
