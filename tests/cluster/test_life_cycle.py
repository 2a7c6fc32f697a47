"""`pregate serve` from start to end, in real processes: what it answers, and what it leaves behind."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from pregate.base.errors import UnavailableError
from pregate.client.client import Client
from tests.cluster.leftovers import (
    listening_ports,
    own_environment,
    processes_of,
    serving,
    shared_memory,
    still_listening,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROMPT = "to be or not"


def generate_until_a_host_is_killed(running, client):
    """Kill a host during a long answer; returns the error the client got and after how many seconds."""
    killed_s = []

    def kill_soon():
        time.sleep(0.5)
        running.children("ExpertHostActor")[0].kill()
        killed_s.append(time.monotonic())

    with client.generate(PROMPT, max_tokens=4000) as generation:
        next(generation)
        threading.Thread(target=kill_soon).start()
        with pytest.raises(UnavailableError) as caught:
            for _ in generation:
                pass
    return str(caught.value), time.monotonic() - killed_s[0]


def test_interrupt_drains_and_leaves_nothing_behind(path_checkpoint):
    before = shared_memory()
    with serving("--model", path_checkpoint, "--hosts", 2) as running:
        with Client(running.target, timeout_s=60) as client:
            assert client.health()
            completion = client.complete(PROMPT, max_tokens=8)
        assert len(completion.rows_per_host) == 2
        assert min(completion.rows_per_host) > 0
        other = join(running, path_checkpoint, "--hosts", 1)
        assert other.returncode == 2
        assert other.stderr.splitlines()[-1].startswith("pregate: --hosts 1: deployment 'pregate' is running with 2")
        ports = listening_ports(processes_of(running.folder))
        assert ports
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
        assert running.wait_nothing_left(10) == []
        assert still_listening(ports) == set()
        assert shared_memory() <= before


def join(running, checkpoint, *arguments):
    """A second `pregate serve` on the Ray of the first; waits for its end."""
    command = [sys.executable, "-m", "pregate.cli.main", "serve", "--model", checkpoint, "--grpc-port", "0"]
    command += ["--ray-address", running.ray_address, *map(str, arguments)]
    environment = own_environment(running.folder) | {"RAY_AUTH_MODE": "token"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_lost_host_is_told_and_the_launchers_own_death_leaves_nothing(layerwise_checkpoint):
    with serving("--model", layerwise_checkpoint, "--hosts", 2) as running:
        with Client(running.target, timeout_s=120) as client:
            sentence, after_s = generate_until_a_host_is_killed(running, client)
            assert "expert host" in sentence
            assert "is lost" in sentence
            assert after_s < 10
            with pytest.raises(UnavailableError, match="is lost"):
                client.complete(PROMPT, max_tokens=1)
            assert not client.health()
        ports = listening_ports(processes_of(running.folder))
        running.process.kill()
        assert running.wait_nothing_left(60) == []
        assert still_listening(ports) == set()


def test_the_supervisors_death_takes_all_it_owns(path_checkpoint):
    with serving("--model", path_checkpoint, "--hosts", 1) as running:
        running.children("Supervisor")[0].kill()
        assert running.process.wait(60) == 1
        assert "the deployment is gone" in running.log.read_text()
        assert running.wait_nothing_left(30) == []
