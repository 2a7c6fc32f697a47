"""Hosts in processes of their own that are killed, or stopped and woken again."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.echo import EchoActor
from pregate.base.errors import HostLostError
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.actor import ActorOptions
from pregate.workers.link.protocol import GroupKey
from tests.processes import PROCESSES
from tests.router.running import wait_for

HOST_TIMEOUT_S = 1.0
KEY = GroupKey("e", 1, 0, 0)


def serve_forever(folder: str, addresses) -> None:
    actor = EchoActor(ActorOptions("", ipc_folder=folder, heartbeat_s=0.1))
    addresses.put(actor.start())
    time.sleep(300)


def stop(host) -> None:
    """SIGSTOP; returns when every thread stands still: until then one may still answer."""
    os.kill(host.pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{host.pid}/task")
    stands = lambda task: (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"  # noqa: E731
    wait_for(lambda: all(map(stands, tasks.iterdir())), what="the stop")


class HostProcess:
    """Starts the process when there is none; starting costs seconds, so tests share it while it lives."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process = None
        self._address = None

    def ensure(self):
        """Return the process and the address it serves at."""
        if self._process is None or not self._process.is_alive():
            addresses = PROCESSES.Queue()
            self._process = PROCESSES.Process(target=serve_forever, args=(self._folder, addresses), daemon=True)
            self._process.start()
            self._address = addresses.get(timeout=240)
        return self._process, self._address

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = HostProcess(str(tmp_path_factory.mktemp("loss") / "run"))
    yield started
    started.kill()


@pytest.fixture
def process(processes):
    """A host's process, and a client past its handshake."""
    process, address = processes.ensure()
    assert address.pid == process.pid != os.getpid()
    client = ChannelClient(address, ChannelOptions(host_timeout_s=HOST_TIMEOUT_S))
    client.hello(engine="e", fingerprint="echo", dtype=torch.float32, width=8, max_rows=64)
    client.send_group(KEY, torch.ones(2, 8))
    assert torch.equal(client.receive(KEY, 30.0), torch.ones(2, 8))
    yield process, client
    client.close()


def lost_after_s(wait, how: str = "(silent for|its connection is cut)") -> float:
    started_s = time.monotonic()
    with pytest.raises(HostLostError, match=f"expert host 0 is lost: {how}"):
        wait()
    return time.monotonic() - started_s


def poll_until_it_raises(client) -> None:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        client.poll()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_host_is_noticed_and_its_answer_reaches_nobody_when_it_wakes(process):
    host, client = process
    stop(host)
    key = KEY._replace(step=2)
    client.send_group(key, torch.zeros(1, 8))
    assert lost_after_s(lambda: client.receive(key, 60.0)) < HOST_TIMEOUT_S + 1.0
    os.kill(host.pid, signal.SIGCONT)
    again = key.next_attempt()
    client.send_group(again, torch.full((1, 8), 7.0))
    assert torch.equal(client.receive(again, 30.0), torch.full((1, 8), 7.0))
    assert client.stats.renewals and not client.stats.discarded_answers


@pytest.mark.slow
def test_a_host_that_pauses_while_idle_is_taken_back_when_it_wakes(process):
    host, client = process
    stop(host)
    lost_after_s(lambda: poll_until_it_raises(client))
    time.sleep(2 * HOST_TIMEOUT_S)
    with pytest.raises(HostLostError):
        client.poll()
    os.kill(host.pid, signal.SIGCONT)
    give_up_s, key = time.monotonic() + 60, KEY._replace(step=3)
    while True:
        try:
            client.poll()
            client.send_group(key, torch.full((1, 8), 7.0))
            answer = client.receive(key, 30.0)
            break
        except HostLostError:  # not back yet; or missed once more, on a busy machine
            assert time.monotonic() < give_up_s
            key = key._replace(step=key.step + 1)
            time.sleep(0.05)
    assert torch.equal(answer, torch.full((1, 8), 7.0))


@pytest.mark.slow
def test_a_killed_host_is_noticed_by_its_closed_connection(process):
    host, client = process
    os.kill(host.pid, signal.SIGKILL)
    key = KEY._replace(step=2)
    client.send_group(key, torch.ones(1, 8))
    assert lost_after_s(lambda: client.receive(key, 60.0), "its connection is cut") < 60
    assert lost_after_s(lambda: poll_until_it_raises(client), "its connection is cut") < 30
    client.fence()
    assert not client.returned()
