"""`pregate serve` from start to end, in real processes: what it answers, and what it leaves behind."""

import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
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
#: What a process of ours may hold that computes nothing. Ray's own part of it is 90 MB.
MAX_LIGHT_BYTES = 150 * 10**6


def generate_until_a_host_is_killed(running, client):
    """Kill host 0 during a long answer; returns the error the client got and after how many seconds."""
    killed_s = []
    victim = min(running.children("ExpertHostActor"), key=lambda process: process.pid)  # started first

    def kill_soon():
        time.sleep(0.5)
        victim.kill()
        killed_s.append(time.monotonic())

    with client.generate(PROMPT, max_tokens=4000) as generation:
        next(generation)
        threading.Thread(target=kill_soon).start()
        with pytest.raises(UnavailableError) as caught:
            for _ in generation:
                pass
    return str(caught.value), time.monotonic() - killed_s[0]


LIGHT = ("Supervisor", "DoorActor", "cluster.local_ray")


def check_light(pids):
    """No torch, and little else, in the processes that only start, hold and speak."""
    assert len(pids) == 1 + len(LIGHT)
    for process in map(psutil.Process, pids):
        name = " ".join(process.cmdline())[:60]
        assert not [m.path for m in process.memory_maps() if "libtorch" in m.path], name
        assert process.memory_info().rss < MAX_LIGHT_BYTES, (name, process.memory_info().rss)


def open_urls(processes):
    """What Ray's processes serve over HTTP, if they do, beyond loopback."""
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith("127."):
                yield f"http://{connection.laddr.ip.replace('0.0.0.0', '127.0.0.1')}:{connection.laddr.port}/metrics"


def answers_anybody(url):
    try:
        return urllib.request.urlopen(url.replace("http://:::", "http://[::1]:"), timeout=5).status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False
    except Exception:  # noqa: BLE001 - a gRPC port speaks no HTTP/1
        return False


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
        processes = processes_of(running.folder)
        ports = listening_ports(processes)
        assert ports
        assert [url for url in open_urls(processes) if answers_anybody(url)] == []
        check_light([running.process.pid, *(p.pid for n in LIGHT for p in running.children(n))])
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


def test_a_lost_host_ends_the_server_with_a_reason(layerwise_checkpoint):
    with serving("--model", layerwise_checkpoint, "--hosts", 2) as running:
        with Client(running.target, timeout_s=120) as client:
            sentence, after_s = generate_until_a_host_is_killed(running, client)
        assert "is lost" in sentence
        assert after_s < 10
        assert running.process.wait(60) == 1
        last = running.log.read_text().splitlines()[-1]
        assert last.startswith("pregate: host 0 is lost: its process died"), last
        logs = running.kept_logs
        assert "host 0 is lost" in "".join(path.read_text() for path in logs.glob("worker-*.err"))
        shutil.rmtree(logs.parent)
        assert running.wait_nothing_left(10) == []


def test_the_loss_of_ray_ends_a_start_at_once(path_checkpoint):
    with serving("--model", path_checkpoint, until="loading the engine") as running:
        next(p for p in processes_of(running.folder) if p.name() == "gcs_server").kill()
        assert running.process.wait(20) == 1
        last = running.log.read_text().splitlines()[-1]
        assert last.startswith("pregate: Ray is lost: its control service at "), last
        shutil.rmtree(running.kept_logs.parent)
        assert running.wait_nothing_left(10) == []


def test_the_launchers_own_death_leaves_nothing(path_checkpoint):
    with serving("--model", path_checkpoint) as running:
        ports = listening_ports(processes_of(running.folder))
        running.process.kill()
        assert running.wait_nothing_left(60) == []
        assert still_listening(ports) == set()


def test_the_supervisors_death_takes_all_it_owns(path_checkpoint):
    with serving("--model", path_checkpoint) as running:
        running.children("Supervisor")[0].kill()
        assert running.process.wait(60) == 1
        assert "the supervisor of the deployment is gone" in running.log.read_text()
        shutil.rmtree(running.kept_logs.parent)
        assert running.wait_nothing_left(30) == []
