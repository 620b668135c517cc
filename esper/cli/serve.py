"""`esper serve`: schedules, triggers and workers; or the workers of another machine."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from esper.leyline.errors import SpecError

if TYPE_CHECKING:
    from flows.serve import ServeOptions, WorkerOptions

Flag = Annotated[bool, Parameter(negative="")]
END_WITHIN_S = 60.0


def serve(
    *,
    store: str | None = None,
    config: str | None = None,
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
    devices: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    expose: Flag = False,
    dry_run: Flag = False,
    role: Literal["server", "worker"] = "server",
    api: str | None = None,
    pool: str | None = None,
    limit: int | None = None,
    credentials_block: str | None = None,
) -> None:
    """Run Prefect for a store: server, work pools, deployments with their schedules and triggers, and workers.

    One command, until Ctrl-C or SIGTERM; nothing outlives it. Other commands on the store find the server and use it.
    A second machine runs workers alone: `esper serve --role worker --api http://HOST:4200/api --pool cpu --limit 2`.
    Credentials come from the environment, or from a Prefect block, alone.

    Args:
        store: Folder of the datasets, or s3://bucket/prefix (default: $ESPER_STORE, else datasets/local).
        config: Name or TOML file of what is served (default: default).
        host: Where the server listens (default: 127.0.0.1); another host needs --expose.
        port: Its port (default: 4200); 0 takes a free one.
        workers: Worker processes of pool `cpu` on this machine, one run at a time each (default: 1).
        devices: GPU slots of this machine, as `cuda:0 cuda:1`: one worker of pool `gpu` (or of --pool) for each.
        expose: Let other machines reach the server; who reaches it can start work here.
        dry_run: Print the deployments and when they fire next; start nothing.
        role: `server`, or `worker` for the workers of another machine's server.
        api: Address of that server's API.
        pool: The pool whose runs the workers of --role worker take (default: cpu).
        limit: How many runs at once they take (default: 1).
        credentials_block: A block of the server whose variables the workers get: NAME of a Secret that holds a JSON
            object, or aws-credentials/NAME.
    """
    from flows.ending import ending_when_told

    slots = tuple(devices or ())
    if slots:
        from esper.tolaria.workers import check_devices

        check_devices(slots)
    server_alone = {"--store": store, "--config": config, "--host": host, "--port": port, "--workers": workers}
    worker_alone = {"--api": api, "--pool": pool, "--limit": limit}
    if role == "worker":
        _refuse(server_alone | {"--expose": expose or None, "--dry-run": dry_run or None}, "--role worker")
        if slots and limit is not None:
            raise SpecError(
                "--limit beside --devices\n  expected: one of them; each device is a slot for one run at once"
            )
        if api is None:
            raise SpecError("--role worker without --api\n  expected: --api http://HOST:PORT/api of the server")
        from flows.serve import WorkerOptions

        with ending_when_told(END_WITHIN_S):
            _work(WorkerOptions(api, pool or "cpu", 1 if limit is None else limit, slots, credentials_block))
        return
    _refuse(worker_alone, "a server (they are for --role worker)")
    from flows.serve import DEFAULT_PORT, DEFAULT_SERVICE, ServeOptions, describe

    options = ServeOptions(
        store=store,
        config=config or DEFAULT_SERVICE,
        host=host or "127.0.0.1",
        port=DEFAULT_PORT if port is None else port,
        workers=1 if workers is None else workers,
        devices=slots,
        expose=expose,
        credentials_block=credentials_block,
    )
    if dry_run:
        service = options.check()
        print("\n".join(describe(service)))
        print("pools: " + ", ".join(f"{name} {slots} slots" for name, slots in service.pools.items()))
        print("nothing was started; the same command without --dry-run serves it")
        return
    with ending_when_told(END_WITHIN_S):
        _serve(options)


def _refuse(given: Mapping[str, object], role: str) -> None:
    found = [name for name, value in given.items() if value is not None]
    if found:
        raise SpecError(f"{', '.join(found)} with {role}\n  leave it out")


def _say(text: str) -> None:
    """Print a line with the time (UTC), at once: a service's output is read while it runs."""
    print(f"{datetime.datetime.now(datetime.UTC):%H:%M:%S} {text}", flush=True)


def _serve(options: ServeOptions) -> None:
    from flows.serve import AUTH_VARIABLE, LOOPBACK_HOSTS, serving
    from flows.server import EVERYWHERE

    with contextlib.suppress(KeyboardInterrupt), serving(options, _say) as service:
        ui = service.server.url.removesuffix("/api")
        _say(f"UI {ui}   API {service.server.url}   state {service.server.home}")
        if options.host not in LOOPBACK_HOSTS:
            host = platform.node() if options.host in EVERYWHERE else options.host
            reached = f"http://{host}:{service.server.port}/api"
            _say(f"other machines reach it: esper serve --role worker --api {reached} --pool cpu --limit 2")
            if not os.environ.get(AUTH_VARIABLE):
                _say(
                    f"warning: whoever reaches {options.host} can start work here; set {AUTH_VARIABLE} to USER:PASSWORD"
                )
        for line in service.lines:
            _say(line)
        _say(f"workers: {', '.join(plan.name for plan in service.workers.plans) or 'none'}; Ctrl-C ends everything")
        try:
            service.watch()
        finally:
            _say("ending: workers, then the server")
    _say("ended")


def _work(options: WorkerOptions) -> None:
    from flows.serve import WATCH_S, working

    with contextlib.suppress(KeyboardInterrupt), working(options, _say) as workers:
        _say(f"workers of pool {options.pool} at {options.api}: {', '.join(plan.name for plan in workers.plans)}")
        try:
            while True:
                workers.tend()
                time.sleep(WATCH_S)
        finally:
            _say("ending the workers")
    _say("ended")
