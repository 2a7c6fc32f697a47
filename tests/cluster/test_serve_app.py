"""The Serve application on the Ray of a running `pregate serve`: one deployment, two doors, the same text."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest

from pregate.base.errors import UnavailableError, UserError
from pregate.client.client import Client
from pregate.router.doors.service import RouterService
from pregate.router.link.client import EngineClient, EngineClientOptions
from tests.cluster.leftovers import ROOT, own_environment, serving, wait_for
from tests.router.running import LoopThread, engine_thread, local_engine, socket_folder
from tests.router.running import wait_for as eventually

PROMPT = "to be or not"
RUN = """
import sys, signal, threading
import ray
from ray import serve
from pregate.cluster.serve_app import build_app
address, port, model = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
serve.start(http_options={"port": int(port)})
serve.run(build_app({"model": model, "hosts": "2"}))
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())  # last: Ray puts handlers of its own in place
print("app ready", flush=True)
stop.wait()
serve.shutdown()
"""


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"hosts": "2"}, "model: missing"),
        ({"model": "TINY", "hosts": "2", "colour": "1"}, "colour 1: unknown option; allowed: model, hosts"),
        ({"model": "TINY", "hosts": "two"}, "hosts two: allowed: 0 or more"),
        ({"model": "TINY", "hosts": "6"}, "hosts 6: allowed: 0 to 5"),
        ({"model": "TINY", "max_queued_requests": "0"}, "max_queued_requests 0: allowed: 1 or more"),
        ({"model": "/no/such"}, "model /no/such: no such folder"),
    ],
)
def test_bad_arguments_are_named(layerwise_checkpoint, args, sentence):
    from pregate.cluster.serve_app import build_app

    with pytest.raises(UserError, match=sentence):
        build_app({k: str(layerwise_checkpoint) if v == "TINY" else v for k, v in args.items()})


def test_on_serves_command_line_a_bad_argument_is_one_sentence(layerwise_checkpoint):
    run = [sys.executable, "-m", "ray.serve.scripts", "run", "pregate.cluster.serve_app:build_app"]
    done = subprocess.run([*run, "model=/no/such"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: model /no/such: no such folder; allowed: a checkpoint folder"
    assert "Traceback" not in done.stderr


def ask(port, **fields):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


def streamed_ids(text):
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert all("choices" in event for event in events), text
    return [i for event in events for choice in event["choices"] for i in choice["token_ids"]]


def test_a_replica_is_as_healthy_as_its_engine(tiny_path_checkpoint):
    """The engine's end by a bug leaves the lease as it is; Serve restarts the replica only when its health says so."""
    from pregate.cluster.serve_app import Replica

    loop = LoopThread()
    with local_engine(tiny_path_checkpoint) as engine, socket_folder() as folder:
        client = EngineClient(f"ipc://{folder}/e", options=EngineClientOptions(keep_alive_s=0.05, silence_s=0.5))
        service = RouterService(client, tiny_path_checkpoint, "tiny")
        replica: Any = SimpleNamespace(_deployment=SimpleNamespace(lost=None), _service=service)
        with engine_thread(engine, f"ipc://{folder}/e"):
            loop.call(service.model_info())
            Replica.check_health(replica)
        eventually(lambda: client.unavailable, what="the end of the engine")
        with pytest.raises(UnavailableError, match="the engine"):
            Replica.check_health(replica)
        loop.call(service.close())
    loop.close()


@pytest.mark.ray
@pytest.mark.slow
def test_http_shares_the_hosts_of_a_running_server_and_outlives_it(path_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving("--model", path_checkpoint, "--hosts", 2) as running:
        log = running.folder / "app.log"
        environment = own_environment(running.folder) | {"RAY_AUTH_MODE": "token"}
        command = [sys.executable, "-c", RUN, running.ray_address, str(port), str(path_checkpoint)]
        with log.open("w") as file:
            app = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
        wait_for(log, "app ready", app)
        with Client(running.target, timeout_s=60) as client:
            expected = list(client.complete(PROMPT, max_tokens=8).token_ids)
        assert len(running.children("ExpertHostActor")) == 2
        assert json.loads(ask(port))["choices"][0]["token_ids"] == expected
        assert streamed_ids(ask(port, stream=True)) == expected
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
        assert json.loads(ask(port))["choices"][0]["token_ids"] == expected
        app.send_signal(signal.SIGINT)
        assert app.wait(60) == 0
        log.unlink()
        assert running.wait_nothing_left(60) == []
