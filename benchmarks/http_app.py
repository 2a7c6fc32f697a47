"""The Serve application of one's own beside a `pregate serve`, on its Ray and its deployment."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.cluster.leftovers import ROOT, Running, own_environment, wait_for

#: `serve run`, with the application's own settings.
_APP = """
import json, signal, sys, threading
import ray
from ray import serve
from pregate.cluster.serve_app import build_app
address, port, args = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(build_app(json.loads(args)))
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())
print("app ready", flush=True)
stop.wait()
serve.shutdown()
"""
_STOP_S = 60.0


@contextmanager
def http_app(running: Running, args: Mapping[str, Any]) -> Iterator[str]:
    """Where the application with these arguments answers, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _APP, running.ray_address, str(port), json.dumps(args)]
    log, environment = running.folder / "app.log", own_environment(running.folder) | {"RAY_AUTH_MODE": "token"}
    with log.open("w") as file:
        app = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
    wait_for(log, "app ready", app)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        app.send_signal(signal.SIGINT)
        app.wait(_STOP_S)
