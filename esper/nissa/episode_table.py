"""Episodes as a readable table, one line an epoch, while they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from pydantic import JsonValue

from esper.leyline.events import Event, EventKind

_ACTION_WIDTH = 30
_SLOT_WIDTH = 14


class EpisodeTable:
    """A sink that prints the epochs and the end of each episode; the seeds' own events are left to other sinks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        """Print what belongs into the table."""
        data = event.data
        if event.kind is EventKind.EPISODE_STARTED:
            self._say(_start_lines(data))
        elif event.kind is EventKind.EPISODE_EPOCH:
            self._say(_epoch_line(data))
        elif event.kind is EventKind.GOVERNOR_ROLLBACK:
            what = "gave up" if data["gave_up"] else f"restored epoch {data['restored_epoch']}"
            self._say(f"{'':>5}  governor: {data['reason']}; {what}, learning rate x {data['lr_scale']:g}")
        elif event.kind is EventKind.EPISODE_ENDED:
            self._say(_end_line(data) + "\n")

    def _say(self, text: str) -> None:
        self._stream.write(text.rstrip(" ") + "\n")
        self._stream.flush()


def _start_lines(data: Mapping[str, JsonValue]) -> str:
    slots = data["slots"] if isinstance(data["slots"], list) else []
    head = f"{'epoch':>5} {'val %':>6} {'control':>7} {'gain':>6}  {'action':<{_ACTION_WIDTH}}"
    return (
        f"episode {data['episode']}: {data['environment']}, replicate {data['replicate']}, "
        f"host of {data['host_params']:,} parameters, {data['controller']}; data: {data['data_source']}\n"
        f"{head} {' '.join(f'{slot:<{_SLOT_WIDTH}}' for slot in slots)}"
    )


def _epoch_line(data: Mapping[str, JsonValue]) -> str:
    stages = data["stages"] if isinstance(data["stages"], dict) else {}
    action = "" if data["op"] is None else str(data["op"])
    if data["refused_by"] is not None:
        action = f"{action} refused {data['refused_by']}"
    cells = " ".join(f"{stage!s:<{_SLOT_WIDTH}}" for stage in stages.values())
    return (
        f"{data['epoch']:>5} {_percent(data['val_accuracy_percent']):>6} "
        f"{_percent(data['control_val_accuracy_percent']):>7} {_signed(data['gain_points']):>6}  "
        f"{action:<{_ACTION_WIDTH}} {cells}"
    )


def _end_line(data: Mapping[str, JsonValue]) -> str:
    return (
        f"episode {data['episode']} {data['outcome']}: test {_percent(data['test_accuracy_percent'])} %, "
        f"never-act {_percent(data['control_test_accuracy_percent'])} %, "
        f"paired gain {_signed(data['test_gain_points'])}; "
        f"{data['host_params']:,} + {data['seed_params']:,} parameters; seeds: {data['num_germinated']} germinated, "
        f"{data['num_fossilized']} fossilized, {data['num_pruned']} pruned; {data['wall_s']:.1f} s"
    )


def _percent(value: JsonValue) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _signed(value: JsonValue) -> str:
    if not isinstance(value, int | float):
        return "–"
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text
