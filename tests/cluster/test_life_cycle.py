"""`pregate serve` from start to end, in real processes: what it answers, and what it leaves behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from pregate.client.client import Client
from tests.cluster.leftovers import (
    ROOT,
    connections_of,
    listening_ports,
    own_environment,
    processes_of,
    serving,
    shared_memory,
    still_listening,
    wait_for,
)
from tests.otlp import collector
from tests.router.running import wait_for as eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROMPT = "to be or not"
RUN = """
import sys, signal, threading
import ray
from ray import serve
from pregate.cluster.serve_app import build_app
address, port, model, otlp = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
serve.start(http_options={"port": int(port)})
serve.run(build_app({"model": model, "hosts": "2", "log_format": "json", "otlp_endpoint": otlp}))
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())  # last: Ray puts handlers of its own in place
print("app ready", flush=True)
stop.wait()
serve.shutdown()
"""
#: What a process of ours may hold that computes nothing; Ray's own part of it is 90 MB. Counted is its proportional
#: share (PSS): how much of the libraries that all processes of Ray map is resident differs by machine, and held once.
MAX_LIGHT_BYTES = 150 * 10**6


LIGHT = ("Supervisor", "DoorActor", "cluster.local_ray")


def check_light(pids):
    """No torch, and little else, in the processes that only start, hold and speak."""
    assert len(pids) == 1 + len(LIGHT)
    for process in map(psutil.Process, pids):
        name = " ".join(process.cmdline())[:60]
        assert not [m.path for m in process.memory_maps() if "libtorch" in m.path], name
        held = process.memory_full_info().pss
        assert held < MAX_LIGHT_BYTES, (name, held)


def open_urls(processes):
    """What Ray's processes serve over HTTP, if they do, beyond loopback."""
    for process in processes:
        for connection in connections_of(process):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith("127."):
                yield f"http://{connection.laddr.ip.replace('0.0.0.0', '127.0.0.1')}:{connection.laddr.port}/metrics"


def answers_anybody(url):
    try:
        return urllib.request.urlopen(url.replace("http://:::", "http://[::1]:"), timeout=5).status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False
    except Exception:  # noqa: BLE001 - a gRPC port speaks no HTTP/1
        return False


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


def test_two_launchers_share_a_deployment_and_the_last_leaves_nothing(path_checkpoint, monkeypatch):
    """The Serve application on the Ray of a running `pregate serve`: one deployment, two doors, the same text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = shared_memory()
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    with (
        collector() as traces,
        serving(
            "--model", path_checkpoint, "--hosts", 2, "--log-format", "json", "--otlp-endpoint", traces.url
        ) as running,
    ):
        with Client(running.target, timeout_s=60) as client:
            assert client.health()
            completion = client.complete(PROMPT, max_tokens=8)
            logs = client.server_info().logs
        assert len(completion.rows_per_host) == 2
        assert min(completion.rows_per_host) > 0
        other = join(running, path_checkpoint, "--hosts", 1, "--log-format", "json", "--otlp-endpoint", traces.url)
        assert other.returncode == 2
        refusal = json.loads(other.stderr.splitlines()[-1])
        assert refusal["message"].startswith("--hosts 1: deployment 'pregate' is running with 2")
        processes = processes_of(running.folder)
        ports = listening_ports(processes)
        assert ports
        assert [url for url in open_urls(processes) if answers_anybody(url)] == []
        check_light([running.process.pid, *(p.pid for n in LIGHT for p in running.children(n))])

        log = running.folder / "app.log"
        environment = own_environment(running.folder) | {"RAY_AUTH_MODE": "token"}
        command = [sys.executable, "-c", RUN, running.ray_address, str(port), str(path_checkpoint), traces.url]
        with log.open("w") as file:
            app = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
        wait_for(log, "app ready", app)
        assert len(running.children("ExpertHostActor")) == 2
        expected = list(completion.token_ids)
        assert json.loads(ask(port))["choices"][0]["token_ids"] == expected
        assert streamed_ids(ask(port, stream=True)) == expected
        check_logs(running, completion.request_id, Path(logs))
        check_traces(traces)
        running.process.terminate()  # the demo ends with SIGINT
        assert running.process.wait(60) == 0
        assert json.loads(ask(port))["choices"][0]["token_ids"] == expected
        app.send_signal(signal.SIGINT)
        assert app.wait(60) == 0
        log.unlink()
        assert running.wait_nothing_left(60) == []
        assert still_listening(ports) == set()
        assert shared_memory() <= before


def check_logs(running, request_id, folder):
    """Every process logs objects, where the launcher and a door say; door, path service and engine say when a request
    began and how it ended."""
    files = [running.log, *folder.glob("worker-*.err")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.startswith("{")]
    roles = {"launcher", "supervisor pregate", "engine", "path service", "host 0", "host 1", "door", "http door"}
    assert {line["role"] for line in lines} == roles
    assert f"engine, hosts and doors log to {folder}/worker-*.err" in [line["message"] for line in lines]
    said = {line["role"]: [] for line in lines}
    for line in lines:
        if line.get("request_id") == request_id:
            said[line["role"]].append(line["message"].partition(":")[0])
    assert said["door"] == ["taken", "text ended"]
    assert said["path service"] == said["engine"] == ["taken", "ended"]


def check_traces(traces):
    """Each request is one trace of all that worked on it: three texts of eight tokens, two of them through Serve."""
    found = {}

    def roles():
        found.clear()
        for one in traces.spans:
            found.setdefault(one.span.trace_id, []).append(one)
        parts = [{(one.role, one.name) for one in trace} for trace in found.values()]
        whole = [p for p in parts if {"path service", "engine", "host 0", "host 1"} <= {role for role, _ in p}]
        return [p for p in whole if any(name == "request" for _, name in p)]  # the door's own comes last

    eventually(lambda: len(roles()) >= 3, 20, "three traces")
    doors = [{role for role, name in parts if name == "request"} for parts in roles()]
    assert sorted(doors, key=str) == [{"door"}, {"http door"}, {"http door"}]
    steps = [sum(one.role == "host 0" for one in trace) for trace in found.values()]
    assert max(steps) <= 9, "one a step"


def join(running, checkpoint, *arguments):
    """A second `pregate serve` on the Ray of the first; waits for its end."""
    command = [sys.executable, "-m", "pregate.cli.main", "serve", "--model", checkpoint, "--grpc-port", "0"]
    command += ["--ray-address", running.ray_address, *map(str, arguments)]
    environment = own_environment(running.folder) | {"RAY_AUTH_MODE": "token"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def cores_of_threads(process):
    """What each thread of a process may run on, one entry for each kind."""
    return {tuple(os.sched_getaffinity(thread.id)) for thread in process.threads()}


def stream_while_killed(client, process):
    """Ids of a text in whose midst the process is killed."""
    with client.generate(PROMPT, max_tokens=300) as generation:
        next(generation)
        process.kill()
        for _ in generation:
            pass
    return generation.completion.token_ids


def test_a_stream_notices_neither_that_a_host_died_nor_that_the_supervisor_did(layerwise_checkpoint):
    """Nor does the next stream: others take their places, the launcher's screen says so, and it ends as ever."""
    with serving("--model", layerwise_checkpoint, "--hosts", 2, "--pin-cores") as running:
        for process in (*running.children("ExpertHostActor"), *running.children("EngineActor")):
            assert any(len(cores) == 1 for cores in cores_of_threads(process))
        with Client(running.target, timeout_s=120, retry_s=0) as client:
            whole = client.complete(PROMPT, max_tokens=300)
            assert stream_while_killed(client, running.children("ExpertHostActor")[0]) == whole.token_ids
            eventually(lambda: len(running.children("ExpertHostActor")) == 2, what="another host")
            assert client.complete(PROMPT, max_tokens=300).token_ids == whole.token_ids
            assert stream_while_killed(client, running.children("Supervisor")[0]) == whole.token_ids
        assert re.search(r"host [01]: its process died .*a new one is started", running.log.read_text())
        wait_for(running.log, "the supervisor's process died; another one goes on", running.process, 60)
        running.process.terminate()
        assert running.process.wait(60) == 0
        assert running.wait_nothing_left(30) == []


def test_the_loss_of_ray_ends_a_start_at_once(path_checkpoint):
    with serving("--model", path_checkpoint, until="loading the engine") as running:
        running.children("gcs_server")[0].kill()
        assert running.process.wait(20) == 1
        last = running.log.read_text().splitlines()[-1]
        assert last.startswith("pregate: Ray is lost: its control service at "), last
        shutil.rmtree(running.kept_logs.parent)
        assert running.wait_nothing_left(10) == []


def test_the_launchers_own_death_leaves_nothing(path_checkpoint):
    with serving("--model", path_checkpoint, "--hosts", 0) as running:
        ports = listening_ports(processes_of(running.folder))
        running.process.kill()
        assert running.wait_nothing_left(60) == []
        assert still_listening(ports) == set()
