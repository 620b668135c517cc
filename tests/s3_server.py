"""A real S3 server for tests: moto's, in a process of its own, with its conditional writes made atomic.

moto looks whether an object is there and then writes it; two requests at once may both find nothing. Real S3 lets one
of them win, so here writes are served one after the other. Below the prefix `FLAKY` every third write is done and then
answered with an error, as by a network that loses the answer. Run as a program, with the address to listen on, it
prints its port and serves until killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BUCKET = "esper-test"
FLAKY = "flaky"
LOST_EVERY = 3
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-but-never-to-be-shown",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class OneWriteAtATime:
    """A WSGI application whose PUT, POST and DELETE requests run one after the other."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._num_flaky = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._application(environ, start_response)
        with self._lock:
            answer = list(self._application(environ, start_response))
            if f"/{FLAKY}/" not in environ["PATH_INFO"]:
                return answer
            self._num_flaky += 1
            if self._num_flaky % LOST_EVERY:
                return answer
        start_response("500 Internal Server Error", [("Content-Length", "0")])
        return [b""]


def main() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = OneWriteAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(sys.argv[1], 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[str]:
    """Yield the loopback address of a running server that has the bucket `BUCKET`; `host` is where it listens."""
    environment = {**os.environ, **CREDENTIALS}
    command = [sys.executable, str(Path(__file__)), host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        create_bucket(endpoint)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def create_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=CREDENTIALS["AWS_REGION"],
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=BUCKET)


def environment_of(endpoint: str, cache: Path) -> dict[str, str]:
    """The environment variables by which Esper reaches the server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "ESPER_CACHE": str(cache)}


if __name__ == "__main__":
    main()
