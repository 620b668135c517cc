"""A Prefect server of one's own, for as long as a command runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from esper.karn.store import open_store
from esper.tolaria.workers import temporary_environment
from flows.context import RunOptions
from flows.ending import CAN_END_WITH_PARENT, end_with_parent
from flows.homes import HOME, ServerError, healthy, held, make_home, say_who_holds, serve_address
from flows.orchestration import Orchestrator

T = TypeVar("T")
Request = TypeVar("Request", bound=RunOptions)

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0
HEARTBEAT_EVERY_S = 30
"""Every run tells the server so often that it lives, a command's own too: one that is silent is taken for lost."""

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, never bound by default
API_URL = "PREFECT_API_URL"


def settings(home: Path) -> dict[str, str]:
    """Return Prefect's settings for server, worker and client: state under `home`, no analytics, a quiet console.

    Logs still reach the server; only what would be printed between Esper's own lines is left out.
    """
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SHOW_WELCOME_MESSAGE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_EVERY_S),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # of the address that the browser is at, whichever port that has
        "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "10",  # of a schedule ahead; a short interval would make 100
    }


@dataclass
class PrefectServer:
    """A server process with its state in `home`; `start` it from the main thread, to which its life is tied."""

    home: Path
    host: str = LOOPBACK
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of its API, as this machine reaches it."""
        host = LOOPBACK if self.host in EVERYWHERE else self.host
        return f"http://{host}:{self.port}/api"

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.home / "server.log"

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        self.port = self.port or _free_port(self.host)
        environment = os.environ | settings(self.home)
        environment.pop(API_URL, None)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", self.host, "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = start_child(command, environment, log)

    def wait_until_ready(self) -> None:
        """Return when the server answers; ServerError where it ended, or took too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not healthy(self.url):
            if not self.alive:
                code = None if self.process is None else self.process.returncode
                raise ServerError(f"Prefect's server ended with code {code} before it was ready\n{self._hint()}")
            if time.monotonic() > deadline:
                raise ServerError(f"Prefect's server was not ready after {START_TIMEOUT_S:.0f} s\n{self._hint()}")
            time.sleep(0.2)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process is not None:
            stop_group(self.process)

    def _hint(self) -> str:
        return f"  its output: {self.log}\n  most commands do the same work without it: --no-prefect"


def start_child(command: list[str], environment: dict[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own that ends with this one, its output in a log."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for the parent, which stops it when its runs have ended
        preexec_fn=end_with_parent if CAN_END_WITH_PARENT else None,  # noqa: PLW1509
    )


def stop_group(process: subprocess.Popen[bytes], patience_s: float = STOP_TIMEOUT_S) -> None:
    """End a process of `start_child` and its group: asked first, then killed."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience_s)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ServerError(f"cannot listen on {host}: {error.strerror}") from None
        return int(probe.getsockname()[1])


def _send_what_is_queued() -> None:
    """Logs and events are sent in the background; once the server is gone they would only fail, noisily."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=STOP_TIMEOUT_S)
    EventsWorker.drain_all(timeout=STOP_TIMEOUT_S)


@contextlib.contextmanager
def using_server(url: str, home: Path) -> Iterator[None]:
    """Within it, the process environment and Prefect's settings name a server."""
    with temporary_environment(settings(home) | {API_URL: url}):
        # The environment must be set before the import, which takes a second or two.
        from prefect.settings import temporary_settings

        with temporary_settings({"api.url": url, "home": str(home)}):
            try:
                yield
            finally:
                _send_what_is_queued()


@contextlib.contextmanager
def running_server(home: Path, host: str = LOOPBACK, port: int = 0) -> Iterator[PrefectServer]:
    """Run a Prefect server and point this process at it; port 0 takes a free one.

    State and log lie in `home` (made if missing). Inside, the process environment and Prefect's settings name the
    server; afterwards both are as before and the server is gone, whatever happened. It also ends when this process is
    killed (Linux). Call it from the main thread: the kernel ties the server's life to the thread that started it.

    Raises:
        ServerError: The server ended, or was not ready in time.
    """
    server = PrefectServer(make_home(home), host, port)
    server.start()
    try:
        with temporary_environment(settings(server.home) | {API_URL: server.url}):
            import prefect.settings  # noqa: F401 - while the server starts

        server.wait_until_ready()
        with using_server(server.url, server.home):
            yield server
    finally:
        server.stop()


@contextlib.contextmanager
def loopback_server(home: Path) -> Iterator[str]:
    """Run a server on 127.0.0.1 as `running_server` does; yield its API address."""
    with running_server(home) as server:
        yield server.url


@contextlib.contextmanager
def server_for(store: str | Path | None) -> Iterator[str]:
    """Point this process at the Prefect server of a command on a store; yield its API address.

    That is $PREFECT_API_URL where it is set, else the store's running `esper serve`, else a loopback server of the
    command's own. One command at a time keeps its history in the store; another's is gone when it ends.
    """
    home = open_store(store).root / HOME
    found = os.environ.get(API_URL) or serve_address(home)
    if found is not None:
        with using_server(found, make_home(home)):
            yield found
        return
    with held(home) as is_ours:
        own = home if is_ours else home / f"beside-{os.getpid()}"
        try:
            with loopback_server(own) as url:
                if is_ours:
                    say_who_holds(home, "command", url)
                yield url
        finally:
            if not is_ours:
                shutil.rmtree(own, ignore_errors=True)


def run_with_prefect(command: str, request: Request, core: Callable[[Request, Orchestrator], T]) -> T:
    """Run a flow function on the server of its store (see `server_for`)."""
    with server_for(request.store):
        from flows.prefect_flows import run_as_flow  # Prefect reads its settings at import: not before the server's

        return run_as_flow(command, request, core)
