"""Following training runs that worker processes carry out, by the events that they append to the run's folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue, ValidationError

from esper.leyline.events import Event, EventKind
from flows.progress import Reporter

EVERY_S = 0.5
VALUES_STAGE = " (values)"
"""What follows a policy's name in the events of its values, which IQL trains first."""


class EventTail:
    """The events that processes append to a run's folder from now on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("events-*.jsonl"))

    def read(self) -> list[Event]:
        """Return the events since the last call; a line that is still being written waits for the next."""
        found = []
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[path] = self._offsets.get(path, 0) + len(line)
                    with contextlib.suppress(ValidationError):  # a process killed at a write leaves half a line
                        found.append(Event.model_validate_json(line))
        return found


@contextlib.contextmanager
def following(folder: Path, progress: Reporter, steps: Mapping[str, tuple[int, int]]) -> Iterator[None]:
    """Within it, the progress of training runs is shown with their losses.

    Args:
        folder: The run's.
        progress: Where to.
        steps: By policy the gradient steps of its values (0 where it has none) and of itself.
    """
    tail = EventTail(folder)
    running = dict(steps)
    done = threading.Event()

    def show() -> None:
        for event in tail.read():
            name = str(event.data.get("policy"))
            if event.kind is EventKind.TRAIN_STEP:
                _show(event.data, progress, running)
            elif event.kind is EventKind.TRAIN_ENDED and running.pop(name, None) is not None:
                progress.end(name)  # what is read of it later, from another file, is over

    def follow() -> None:
        while not done.wait(EVERY_S):
            show()

    thread = threading.Thread(target=follow, name="esper-losses", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()
        for name in running:
            progress.end(name)


def _show(data: Mapping[str, JsonValue], progress: Reporter, steps: Mapping[str, tuple[int, int]]) -> None:
    policy, step = str(data.get("policy")), data.get("step")
    name = policy.removesuffix(VALUES_STAGE)
    if name not in steps or not isinstance(step, int | float):
        return
    before, own = steps[name]
    done = int(step) + (0 if policy.endswith(VALUES_STAGE) else before)
    progress.reach(name, done, before + own, losses(data))


def losses(data: Mapping[str, JsonValue]) -> str:
    """Return the losses of a training step in words: `policy 1.234, held-out policy 1.301`."""
    return ", ".join(
        f"{key.removesuffix('_loss').replace('held_out', 'held-out').replace('_', ' ')} {value:.4g}"
        for key, value in data.items()
        if isinstance(value, int | float) and key.endswith("_loss")
    )
