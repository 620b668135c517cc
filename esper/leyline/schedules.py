"""What `esper serve` runs by itself: pools of device slots, and flows that a clock or an event starts."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from esper.leyline.spec_base import Spec

SERVED_NAME = r"^[a-z0-9-]{1,40}$"


class ServedFlow(StrEnum):
    """The flows that can be served."""

    DATAGEN = "datagen"
    HEALTH = "health"
    TRAIN = "train"
    EVALUATE = "evaluate"
    TRAIN_AND_EVALUATE = "train-and-evaluate"


class StoreEvent(StrEnum):
    """What happens to a version in the store; `esper.` and this is the name of the Prefect event."""

    SEALED = "version.sealed"
    PASSED = "verdict.passed"
    BLOCKED = "verdict.blocked"


class ServedSpec(Spec):
    """One flow with its parameters, and what starts it: a cron line, an interval, an event, or people alone.

    Attributes:
        name: Of the deployment, which is shown as FLOW/NAME.
        flow: What runs.
        pool: The work pool on whose slots it runs.
        cron: Five fields, in `timezone`.
        interval_s: Seconds from start to start.
        timezone: Of the cron line, an IANA name.
        on: The event that starts it, on the version that the event is about; at most once for each version.
        datasets: Only events of these datasets; left out, all.
        parameters: Fields of the flow's request.
        tags: Shown with every run.
        active: A schedule that is not is shown, and never fires.
    """

    name: Annotated[str, Field(pattern=SERVED_NAME)]
    flow: ServedFlow
    pool: Annotated[str, Field(pattern=SERVED_NAME)] = "cpu"
    cron: str | None = None
    interval_s: Annotated[float, Field(gt=0)] | None = None
    timezone: str = "UTC"
    on: StoreEvent | None = None
    datasets: tuple[str, ...] | None = None
    parameters: Mapping[str, JsonValue] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()
    active: bool = True

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = [name for name in ("cron", "interval_s", "on") if getattr(self, name) is not None]
        if len(starts) > 1:
            raise ValueError(f"{self.name}: {' and '.join(starts)}; expected one of cron, interval_s, on")
        if self.on is not None and "dataset" in self.parameters:
            raise ValueError(f"{self.name}: the event says which version; leave `dataset` out, `datasets` limits which")
        if self.on is not None and self.flow is ServedFlow.DATAGEN:
            raise ValueError(f"{self.name}: datagen is started by a schedule; an event is about a version that exists")
        if self.datasets is not None and self.on is None:
            raise ValueError(f"{self.name}: `datasets` limits the events of `on`, which is missing")
        if "store" in self.parameters:
            raise ValueError(f"{self.name}: the store is the one that is served; leave `store` out")
        return self

    @property
    def full_name(self) -> str:
        """FLOW/NAME, as Prefect shows it."""
        return f"{self.flow}/{self.name}"


class ServiceSpec(Spec):
    """A service.

    Attributes:
        name: Of the service.
        pools: Slots of each work pool: so many runs at once, on all machines together.
        deployments: What is served.
    """

    name: Annotated[str, Field(pattern=SERVED_NAME)]
    pools: Mapping[str, Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: {"cpu": 2, "gpu": 1})
    deployments: tuple[ServedSpec, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [served.full_name for served in self.deployments]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"deployments named twice: {', '.join(twice)}")
        for served in self.deployments:
            if served.pool not in self.pools:
                raise ValueError(f"{served.name}: unknown pool {served.pool!r}; known: {', '.join(sorted(self.pools))}")
        return self
