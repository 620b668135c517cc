"""What Prefect's server does by itself: flows started by events of the store, and runs that fell silent ended.

An event carries the version that it is about. Each flow that an event starts looks at the store first, so that a
version is never checked or trained on twice, however often the event comes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from esper.karn.store import Store
from esper.karn.versions import Version
from esper.leyline.schedules import ServedSpec, StoreEvent
from esper.leyline.verdict import Level, Use, Verdict
from flows.orchestration import LocalOrchestrator, Orchestrator

if TYPE_CHECKING:
    from prefect.events import DeploymentEventTrigger

SILENT_AFTER_S = 120
"""So long without a heartbeat, and a run's machine is taken for gone; a busy server may lose one or two."""

SILENT = "esper: end runs that fell silent"
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
_HEARTBEAT = "prefect.flow-run.heartbeat"


def event_name(event: StoreEvent) -> str:
    """Return the name under which Prefect knows an event."""
    return f"esper.{event}"


def announce(event: StoreEvent, version: Version, store: Store, orchestrator: Orchestrator) -> None:
    """Tell the Prefect server that the run is on what happened to a version; without Prefect nobody is told."""
    if isinstance(orchestrator, LocalOrchestrator):
        return
    from prefect.events import emit_event

    emit_event(
        event=event_name(event),
        resource={
            "prefect.resource.id": f"esper.version.{version.ref}",
            "prefect.resource.name": version.ref,
            "esper.dataset": version.name,
            "esper.store": store.place.url,
        },
        payload={"version": version.ref, "dataset": version.name, "digest": version.manifest.digest},
    )


def announce_verdict(version: Version, verdict: Verdict, store: Store, orchestrator: Orchestrator) -> None:
    """Tell that a version may be trained on, or that it may not."""
    blocked = verdict.level(Use.OFFLINE_RL) is Level.BLOCK
    announce(StoreEvent.BLOCKED if blocked else StoreEvent.PASSED, version, store, orchestrator)


def trigger_of(served: ServedSpec, store: str) -> DeploymentEventTrigger:
    """Return the trigger that starts a served flow on its event, for versions of one store."""
    from prefect.events import DeploymentEventTrigger

    if served.on is None:
        raise ValueError(f"{served.full_name} waits for no event")
    match: dict[str, Any] = {"esper.store": store}
    if served.datasets is not None:
        match["esper.dataset"] = list(served.datasets)
    return DeploymentEventTrigger(
        name=f"esper: {served.full_name}",
        expect={event_name(served.on)},
        match=match,
        parameters={"dataset": "{{ event.payload.version }}"},
    )


def end_silent_runs() -> None:
    """Have the server end runs whose machine is gone: those that sent heartbeats and send none any more."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events import EventTrigger
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, Posture

    trigger = EventTrigger(
        after={_HEARTBEAT},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{end}" for end in _ENDS)},
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENT_AFTER_S),
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {SILENT_AFTER_S} s: machine gone")
    automation = AutomationCore(name=SILENT, trigger=trigger, actions=[action])
    with get_client(sync_client=True) as client:
        for known in client.read_automations_by_name(SILENT):
            client.delete_automation(known.id)
        client.create_automation(automation)
