"""`esper heuristic`: watch the reference rule grow a network."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from pydantic import JsonValue

Flag = Annotated[bool, Parameter(negative="")]


def heuristic(
    *,
    task: str = "cifar10",
    episodes: int = 1,
    max_epochs: int | None = None,
    max_batches: int | None = None,
    device: str = "cpu",
    seed: int = 42,
    slots: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    max_seeds: int | None = None,
    gates: Literal["permissive", "strict"] | None = None,
    ask_at_every_gate: Flag = False,
    data: str | None = None,
    telemetry: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Run the heuristic on an environment: every epoch with its control, then what growing brought.

    Args:
        task: Name of an environment (underscores are allowed), or a TOML file.
        episodes: Episodes, each on an environment seed of its own.
        max_epochs: Most epochs of an episode; never more than the environment has, which is the default.
        max_batches: Most training batches of an epoch; 0, the default, is as many as the environment has.
        device: `cpu`.
        seed: The first episode's replicate; the next episodes count on from it.
        slots: Slots that may be used, for example `early mid late` (default: the environment's, which is all).
        max_seeds: Most seeds at once, fossils included (default: the environment's).
        gates: `strict` asks measured thresholds at the gates (default: the environment's, which is permissive).
        ask_at_every_gate: Every gate waits for an ADVANCE instead of opening by itself.
        data: Folder of the host's data, for example that of CIFAR-10 as Parquet (default: $ESPER_DATA).
        telemetry: JSONL file to which every event is appended.
        checkpoint: Folder that keeps the running episode after every epoch; the same command goes on from there.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
    from esper.nissa.episode_table import EpisodeTable
    from flows.heuristic import HeuristicRequest, run_heuristic

    request = HeuristicRequest.parse(
        {
            "task": task,
            "episodes": episodes,
            "seed": seed,
            "sizes": {"max_epochs": max_epochs, "max_batches": max_batches or None},
            "slots": slots,
            "max_seeds": max_seeds,
            "gates": gates,
            "ask_at_every_gate": ask_at_every_gate,
            "device": device,
            "data": data,
            "telemetry": telemetry,
            "checkpoint": checkpoint,
        },
        "esper heuristic",
    )
    ended = run_heuristic(request, [EpisodeTable(sys.stdout)])
    if len(ended) > 1:
        _print_summary(ended)
    if telemetry is not None:
        print(f"telemetry  {telemetry}")


def _print_summary(ended: list[dict[str, JsonValue]]) -> None:
    from esper.karn.comparison_table import number
    from esper.simic.statistics import mean_interval

    gains = [float(data["test_gain_points"]) for data in ended]  # type: ignore[arg-type]
    interval = mean_interval(gains, key=("heuristic",))
    mean, low, high = (number(value, 1, signed=True) for value in (interval.mean, interval.low, interval.high))
    print(f"{len(ended)} episodes: paired gain {mean} ({low} … {high}), 95 % interval over environment seeds")
