"""A Prefect server of one's own on the loopback interface, for as long as a command runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from esper.karn.store import open_store
from esper.leyline.errors import EsperError
from esper.tolaria.workers import temporary_environment
from flows.context import RunOptions
from flows.orchestration import Orchestrator

T = TypeVar("T")
Request = TypeVar("Request", bound=RunOptions)

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class ServerError(EsperError):
    """Prefect's server did not start."""


def settings(home: Path) -> dict[str, str]:
    """Return Prefect's settings for server and client: state under `home`, no analytics, a quiet console.

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
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel kills it when the parent is gone, `kill -9` included (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _start(home: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | settings(home)
    environment.pop("PREFECT_API_URL", None)
    with (home / "server.log").open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the parent, which stops the server when its runs have ended
            preexec_fn=_die_with_parent if _LIBC is not None else None,  # noqa: PLW1509
        )


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and everything it started."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=STOP_TIMEOUT_S)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _healthy(url):
        if server.poll() is not None:
            raise ServerError(
                f"Prefect's server ended with code {server.returncode} before it was ready\n"
                f"  its output: {log}\n  --no-prefect does the same work without it"
            )
        if time.monotonic() > deadline:
            raise ServerError(
                f"Prefect's server was not ready after {START_TIMEOUT_S:.0f} s\n"
                f"  its output: {log}\n  --no-prefect does the same work without it"
            )
        time.sleep(0.2)


def _send_what_is_queued() -> None:
    """Logs and events are sent in the background; once the server is gone they would only fail, noisily."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=STOP_TIMEOUT_S)
    EventsWorker.drain_all(timeout=STOP_TIMEOUT_S)


@contextlib.contextmanager
def loopback_server(home: Path) -> Iterator[str]:
    """Run a Prefect server on 127.0.0.1 and point this process at it; yield its API address.

    State and log lie in `home` (made if missing). Inside, the process environment and Prefect's settings name the
    server; afterwards both are as before and the server is gone, whatever happened. It also ends when this process is
    killed (Linux). Call it from the main thread: the kernel ties the server's life to the thread that started it.

    Raises:
        ServerError: The server ended, or was not ready in time.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(f"cannot make {home} for Prefect's state: {error.strerror}") from None
    home = home.resolve()
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    server = _start(home, port)
    try:
        wanted = settings(home) | {"PREFECT_API_URL": url}
        with temporary_environment(wanted):
            # The import takes a second or two, while the server starts; the environment must be set before it.
            from prefect.settings import temporary_settings

            _wait_until_healthy(server, url, home / "server.log")
            with temporary_settings({"api.url": url, "home": str(home)}):
                try:
                    yield url
                finally:
                    _send_what_is_queued()
    finally:
        _stop(server)


def run_with_prefect(command: str, request: Request, core: Callable[[Request, Orchestrator], T]) -> T:
    """Run a flow function on a loopback server whose state lies in the store; the server is gone afterwards."""
    with loopback_server(open_store(request.store).root / ".prefect"):
        from flows.prefect_flows import run_as_flow  # Prefect reads its settings at import: not before the server's

        return run_as_flow(command, request, core)
