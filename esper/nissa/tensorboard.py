"""Losses for TensorBoard: one folder of event files per policy, one scalar per loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from esper.leyline.errors import StoreError
from esper.leyline.events import Event, EventKind

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
"""Of a run; `tensorboard --logdir RUN/tensorboard` shows it."""

_NOT_SCALARS = ("policy", "step")


class TensorBoardSink:
    """Writes the numbers of training steps under `RUN/tensorboard/POLICY`, named as in the event.

    What a stopped run wrote beyond the step from which a later one goes on is superseded: TensorBoard drops it
    (`purge_step`).
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._writers: dict[str, SummaryWriter] = {}

    def __call__(self, event: Event) -> None:
        """Write one event; those that are no training step are none of its business."""
        step = event.data.get("step")
        if event.kind is not EventKind.TRAIN_STEP or not isinstance(step, int | float):
            return
        writer = self._writer(str(event.data["policy"]), int(step))
        for name, value in event.data.items():
            if name not in _NOT_SCALARS and isinstance(value, int | float):
                writer.add_scalar(name, value, int(step))

    def _writer(self, policy: str, step: int) -> SummaryWriter:
        """The writer of a policy; the values of IQL, which are trained before it, get a folder of their own."""
        if policy not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            folder = self._folder / policy.replace(" (values)", "-values")
            try:
                self._writers[policy] = SummaryWriter(str(folder), purge_step=step)
            except OSError as error:
                raise StoreError(f"cannot write {folder}: {error.strerror}") from None
        return self._writers[policy]

    def close(self) -> None:
        """Write what is buffered and close the files."""
        for writer in self._writers.values():
            writer.close()
