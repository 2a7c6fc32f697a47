"""`serve deploy` of deploy/serve.yaml, as deploy/serve.md says it, on the model that ships."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from tests.cluster.leftovers import ROOT, command_of, launched, own_environment, processes_of, wait_for
from tests.router.running import wait_for as eventually

RAY = """
import os, sys, time, ray
ray.init(address="local", num_cpus=8, _temp_dir=os.environ["TMPDIR"], include_dashboard=True,
         dashboard_port=int(sys.argv[1]))
print("Ray is up", flush=True)
time.sleep(3600)
"""
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A Ray with a dashboard, and Serve's command line pointed at it."""

    def __init__(self, running, port: int) -> None:
        self.folder, self.address = running.folder, f"http://127.0.0.1:{port}"

    def serve(self, *words) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *map(str, words), "--address", self.address],
            capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=own_environment(self.folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def replicas(self) -> set[int]:
        return {process.pid for process in processes_of(self.folder) if "ServeReplica" in command_of(process)}

    def application(self) -> dict:
        return yaml.safe_load(self.serve("status"))["applications"].get("pregate", {"status": "NOT_STARTED"})

    def running(self) -> int:
        """How many replicas Serve says are running."""
        found = self.application()["deployments"]["pregate"]
        return found["replica_states"].get("RUNNING", 0)

    def wait(self, status: str) -> dict:
        give_up_s = time.monotonic() + TIMEOUT_S
        while (found := self.application())["status"] != status:
            assert time.monotonic() < give_up_s, found
            assert status == "DEPLOY_FAILED" or found["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), found
            time.sleep(1)
        return found


@pytest.fixture
def cluster():
    port = free_port()
    with launched("-c", RAY, port) as running:
        wait_for(running.log, "Ray is up", running.process)
        yield Cluster(running, port)


def ask(port: int, **body) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@contextmanager
def load(port: int, body: dict, num_clients: int = 4) -> Iterator[list[str]]:
    """Ask without a pause until the block ends; yields what each answer says, or what went wrong in its place."""
    said, done = [], threading.Event()

    def client() -> None:
        while not done.is_set():
            try:
                said.append(ask(port, **body)["choices"][0]["text"])
            except Exception as error:  # noqa: BLE001 - none is allowed
                said.append(repr(error))

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        done.set()
        for thread in threads:
            thread.join(TIMEOUT_S)


@pytest.mark.ray
@pytest.mark.slow
def test_deployed_changed_scaled_by_load_and_shut_down(cluster):
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    args = config["applications"][0]["args"]
    args["model"] = str(ROOT / "examples" / "quartet-paths")
    file = cluster.folder / "serve.yaml"

    file.write_text(yaml.safe_dump(config))
    cluster.serve("deploy", file)
    cluster.wait("RUNNING")
    body = {"model": "quartet-paths", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    first = ask(port, **body)["choices"][0]["text"]
    assert first

    args |= {"max_queued_requests": 17, "max_replicas": 2, "target_ongoing_requests": 1}
    file.write_text(yaml.safe_dump(config))
    before = cluster.replicas()
    with load(port, body) as texts:
        eventually(lambda: len(texts) > 4, TIMEOUT_S, "texts before the change")
        cluster.serve("deploy", file)
        eventually(lambda: not cluster.replicas() & before, TIMEOUT_S, "another replica in place of the first")
        cluster.wait("RUNNING")
        eventually(lambda: len(cluster.replicas()) == 2, TIMEOUT_S, "a second replica, for the load")
        eventually(lambda: time.sleep(1) or cluster.running() == 2, TIMEOUT_S, "a second replica that runs")
        num_texts = len(texts)
        eventually(lambda: len(texts) > num_texts + 8, TIMEOUT_S, "texts while both run")
    assert set(texts) == {first}, "no request failed"
    assert "17" in json.dumps(cluster.serve("config"))
    assert ask(port, **body)["choices"][0]["text"] == first

    cluster.serve("shutdown", "--yes")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        ask(port, **body)
    give_up_s = time.monotonic() + 60
    while left := [c for p in processes_of(cluster.folder) if "Actor" in (c := command_of(p)) and "ray::" in c]:
        assert time.monotonic() < give_up_s, left
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_an_unknown_key_is_named_in_the_status(cluster):
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"] |= {"model": str(ROOT / "examples" / "quartet-paths"), "hostz": 2}
    file = cluster.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    cluster.serve("deploy", file)
    assert "hostz 2: unknown option" in cluster.wait("DEPLOY_FAILED")["message"]
