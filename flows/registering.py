"""Pools and deployments of a service, made or brought up to date on the Prefect server that is set."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from esper.leyline.schedules import ServedFlow, ServedSpec, ServiceSpec
from flows.automations import end_silent_runs, trigger_of

TAG = "esper"
COMMAND = "python -m prefect.engine"
"""How a worker starts a flow run: one process of the installation that the worker is of."""


def register(service: ServiceSpec, store: str, folder: Path) -> list[str]:
    """Make the server's pools, deployments, schedules and triggers those of a service; return the deployments' names.

    Deployments that an earlier service left are deleted.

    Args:
        service: What is served.
        store: Path or address of the store, as every machine knows it.
        folder: Where served flows run, so that `datasets/` beside it is found.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    names = []
    for pool, slots in service.pools.items():
        _make_pool(pool, slots)
        names.append(_deploy_cohorts(pool))
    names += [_deploy(served, store, folder) for served in service.deployments]
    with get_client(sync_client=True) as client:
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        flows = {flow.id: flow.name for flow in client.read_flows()}
        for known in client.read_deployments(deployment_filter=ours):
            if f"{flows.get(known.flow_id)}/{known.name}" not in names:
                client.delete_resource_owned_automations(f"prefect.deployment.{known.id}")
                client.delete_deployment(known.id)
    end_silent_runs()
    return names


def _make_pool(name: str, slots: int) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["command"]["default"] = COMMAND
    pool = WorkPoolCreate(
        name=name, type="process", base_job_template=template, concurrency_limit=slots, description=f"{slots} slots"
    )
    with get_client(sync_client=True) as client:
        client.create_work_pool(pool, overwrite=True)


def _deploy_cohorts(pool: str) -> str:
    """The deployment of a pool's blocks: as many at once as the pool has slots, whichever the machine."""
    from prefect.types.entrypoint import EntrypointType

    from flows.deployments import cohorts

    made = cohorts.to_deployment(
        name=pool,
        work_pool_name=pool,
        description="Blocks of cohorts of `esper datagen --pool`",
        tags=[TAG, "cohorts"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    made.apply()
    return f"cohorts/{pool}"


def _deploy(served: ServedSpec, store: str, folder: Path) -> str:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType

    from flows import deployments

    # What a clock starts is left out while it still runs; what an event starts waits, for it is about another version.
    waits = served.cron is None and served.interval_s is None
    strategy = ConcurrencyLimitStrategy.ENQUEUE if waits else ConcurrencyLimitStrategy.CANCEL_NEW
    once = {"once": True} if served.on is not None and served.flow is not ServedFlow.EVALUATE else {}
    parameters: dict[str, Any] = {**served.parameters, **once, "store": store}
    flow = getattr(deployments, served.flow.replace("-", "_"))
    made = flow.to_deployment(
        name=served.name,
        work_pool_name=served.pool,
        schedules=_schedules(served),
        parameters=parameters,
        tags=[TAG, str(served.flow), *served.tags],
        triggers=[] if served.on is None else [trigger_of(served, store)],
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=strategy),
        job_variables={"working_dir": str(folder)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    made.apply()
    return served.full_name


def _schedules(served: ServedSpec) -> list[Any]:
    from prefect.schedules import Cron, Interval

    if served.cron is not None:
        return [Cron(served.cron, timezone=served.timezone, active=served.active)]
    if served.interval_s is not None:
        every = datetime.timedelta(seconds=served.interval_s)
        return [Interval(every, timezone=served.timezone, active=served.active)]
    return []
