"""Episodes of the heuristic, watched epoch by epoch. They run in this process and are not stored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from esper.leyline.controller_specs import HEURISTIC
from esper.leyline.errors import SpecError, StoreError
from esper.leyline.events import Event, EventKind
from esper.leyline.identity import Role, check_replicate
from esper.leyline.matrix import CohortPlan, PlannedEpisode
from esper.leyline.spec_base import Spec
from esper.leyline.specs import EnvironmentSpec
from esper.nissa.writer import Emitter, FileSink, Sink
from esper.simic.poc_arms import NO_REWARD
from flows.context import new_run_name
from flows.sizes import Sizes, sized_environment


class HeuristicRequest(Spec):
    """Run the heuristic on one environment; the environment's own value holds wherever nothing is given."""

    task: str
    episodes: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 42
    sizes: Sizes = Sizes()
    slots: tuple[str, ...] | None = None
    max_seeds: Annotated[int, Field(ge=0)] | None = None
    gates: Literal["permissive", "strict"] | None = None
    ask_at_every_gate: bool = False
    device: str = "cpu"
    data: str | None = None
    telemetry: str | None = None
    checkpoint: str | None = None

    def environment(self) -> EnvironmentSpec:
        """Return the environment as asked for.

        Raises:
            UnknownNameError: No environment has that name.
            SpecError: A slot, a size or the device does not fit.
        """
        if self.device != "cpu":
            raise SpecError(
                f"--device {self.device!r}: this build trains on the CPU alone\n"
                "  expected: cpu; accuracies do not depend on the device, only the time does"
            )
        changes: dict[str, object] = {}
        for name in ("slots", "max_seeds", "gates"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        if self.ask_at_every_gate:
            changes["ask_at_every_gate"] = True
        return sized_environment(self.task, self.sizes, **changes)

    def plans(self) -> list[CohortPlan]:
        """Return one cohort per episode: the heuristic, and the never-act control that every cohort has."""
        environment = self.environment()
        for replicate in (self.seed, self.seed + self.episodes - 1):
            check_replicate(replicate, Role.DATA)
        return [
            CohortPlan(
                environment=environment,
                reward=NO_REWARD,
                replicate=self.seed + index,
                episodes=(PlannedEpisode(controller=HEURISTIC),),
            )
            for index in range(self.episodes)
        ]


def run_heuristic(request: HeuristicRequest, sinks: Sequence[Sink]) -> list[dict[str, JsonValue]]:
    """Run the episodes one after another and return the data of the event that ends each.

    Args:
        request: What to run.
        sinks: Who watches; the telemetry file is one more.

    Raises:
        SpecError: The request is wrong.
        DataError: The host's data are missing.
        StoreError: The telemetry file cannot be written.
    """
    plans = request.plans()
    from esper.tolaria.tasks import set_data_folder

    set_data_folder(request.data)
    ended: list[dict[str, JsonValue]] = []
    with contextlib.ExitStack() as stack:
        watching = list(sinks)
        if request.telemetry is not None:
            file = FileSink(Path(request.telemetry))
            stack.callback(file.close)
            watching.append(file)
        events = Emitter(new_run_name("heuristic"), [*watching, _keep_ends(ended)])
        events.emit(EventKind.RUN_STARTED, {"command": "heuristic", "request": request.model_dump(mode="json")})
        outcome = "failed"
        try:
            for number, plan in enumerate(plans, start=1):
                _run_episode(plan, number, request.checkpoint, events, ended)
            _forget_ends(request.checkpoint, plans)
            outcome = "completed"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            events.emit(EventKind.RUN_ENDED, {"outcome": outcome})
    return ended


def _run_episode(
    plan: CohortPlan, number: int, folder: str | None, events: Emitter, ended: list[dict[str, JsonValue]]
) -> None:
    """Run one episode, from its checkpoint where there is one; one that has ended is only told again."""
    from esper.tolaria.checkpoint import CheckpointSpec, remove_checkpoint
    from esper.tolaria.rollout import CohortRun
    from esper.tolaria.telemetry import CohortTelemetry

    watch = CohortTelemetry(plan, events.emit, number)
    if folder is None:
        CohortRun.of(plan, watch=watch)
        return
    end = _end_file(folder, plan)
    try:
        if end.is_file():
            events.emit(EventKind.EPISODE_ENDED, json.loads(end.read_text(encoding="utf-8")))
            return
        checkpoint = CheckpointSpec(end.with_suffix(""))
        CohortRun.of(plan, checkpoint=checkpoint, watch=watch)
        end.write_text(json.dumps(ended[-1]), encoding="utf-8")
        remove_checkpoint(checkpoint.folder)
    except OSError as error:
        raise StoreError(f"cannot use the checkpoint in {folder}: {error.strerror}") from None


def _end_file(folder: str, plan: CohortPlan) -> Path:
    """Where an ended episode is kept until all have ended; its checkpoint is the folder beside it."""
    return Path(folder) / f"{plan.episode_ids()[0]}.json"


def _forget_ends(folder: str | None, plans: Sequence[CohortPlan]) -> None:
    for plan in plans if folder is not None else ():
        _end_file(folder or "", plan).unlink(missing_ok=True)
    if folder is not None:
        with contextlib.suppress(OSError):  # something else is in it
            Path(folder).rmdir()


def _keep_ends(ended: list[dict[str, JsonValue]]) -> Sink:
    def keep(event: Event) -> None:
        if event.kind is EventKind.EPISODE_ENDED:
            ended.append(event.data)

    return keep
