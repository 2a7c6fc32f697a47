"""What a deployment stands on taken away while 16 clients ask: a node of the cluster, Ray's control service, the
terminal. `make chaos`."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pregate.base.errors import PregateError
from pregate.client.client import Client
from pregate.cluster import launch
from tests.chaos.deployed import Once, ask_all, deployed
from tests.chaos.hosts import random_references
from tests.cluster.leftovers import (
    ROOT,
    Running,
    listening_ports,
    own_environment,
    processes_of,
    serving,
    shared_memory,
    still_listening,
)
from tests.cluster.leftovers import wait_for as until_said
from tests.cluster.ray_nodes import ray_nodes
from tests.equality import Tally
from tests.router.running import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos"),
]
NUM_PROMPTS, NUM_TOKENS = 16, 60
IN_THE_MIDST = NUM_PROMPTS * NUM_TOKENS // 3


@pytest.fixture(scope="module")
def references(tiny_path_checkpoint):
    return random_references(tiny_path_checkpoint, 19, NUM_PROMPTS, NUM_TOKENS)


#: A node with room for one host (a GPU that nobody uses). Other than machines', its address has to be said.
NODE = {"num_cpus": 4, "num_gpus": 1}


@pytest.fixture
def cluster():
    """A head, to which the tests are connected, and a node."""
    with ray_nodes(NODE, {**NODE, "node_ip_address": "127.0.0.2"}, namespace="pregate") as (one, _, _):
        yield one


def kill_all_of(node):
    """SIGKILL to a node's raylet, the workers on it, and all else it started."""
    started = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    tree = [*started, *(child for process in started for child in process.children(recursive=True))]
    names = " ".join(" ".join(process.cmdline()) for process in tree)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return names


def lost_hosts(target):
    with Client(target, timeout_s=30) as client:
        return [host.host_id for host in client.loads().hosts if host.lost]


def test_a_node_lost_and_replaced(cluster, tiny_path_checkpoint, references):
    """The other host does the work of both; on the new node the lost one comes back."""
    (worker,) = cluster.worker_nodes
    with deployed(tiny_path_checkpoint, hosts=2, gpus_per_host=1) as (made, target):
        ask_all(target, references)
        killed = []
        once = Once(IN_THE_MIDST, lambda: killed.append(kill_all_of(worker)))
        ask_all(target, references, once)
        once.wait()
        assert "ExpertHostActor" in killed[0] and "raylet" in killed[0]
        wait_for(lambda: lost_hosts(target), 60, "a host that is lost")
        ask_all(target, references)
        cluster.add_node(**NODE, node_ip_address="127.0.0.3")
        wait_for(lambda: any("runs again" in note for _, note in made.notes), 240, "the host on the new node")
        wait_for(lambda: not lost_hosts(target), 60, "both hosts")
        ask_all(target, references)
        assert made.lost is None


def test_the_node_of_engine_and_door_lost(tiny_path_checkpoint, references):
    """It is said within seconds; on another such node they come up together, and streams go on at the new door."""
    others = [{**NODE, "node_ip_address": f"127.0.0.{n}", "resources": {"doors": 1}} for n in (2, 3)]
    with (
        ray_nodes(NODE, *others, namespace="pregate") as (cluster, _, _),
        deployed(tiny_path_checkpoint, hosts=2, gpus_per_host=1, engine_node="doors") as (made, target),
    ):
        with Client(target, timeout_s=30) as client:
            old = client.server_info().node
        (lost,) = [node for node in cluster.worker_nodes if node.node_ip_address == old]
        (new,) = {"127.0.0.2", "127.0.0.3"} - {old}
        killed, silent_s = [], []

        def kill_and_look():
            killed.append(kill_all_of(lost))
            said = lambda: any(note.startswith("the engine: ") for _, note in made.notes)  # noqa: E731
            silent_s.append(wait_for(said, 60, "the word of it"))
            given_up = lambda: any("its node was lost" in note for _, note in made.notes)  # noqa: E731
            silent_s.append(silent_s[0] + wait_for(given_up, 60, "the node's end"))

        once = Once(IN_THE_MIDST, kill_and_look)
        ask_all(target, references, once, retry_s=200)
        once.wait()
        assert "EngineActor" in killed[0] and "DoorActor" in killed[0] and "raylet" in killed[0]
        with Client(target, timeout_s=30) as client:
            assert client.server_info().node == new
        notes = [note for _, note in made.notes]
        print(f"said after {silent_s[0]:.1f} s, the node given up after {silent_s[1]:.1f} s", *notes, sep="\n")
        assert f"engines and doors go to node {new}" in notes
        wait_for(lambda: not lost_hosts(target), 60, "both hosts")
        ask_all(target, references)
        assert made.lost is None


def test_the_one_node_for_engine_and_door_lost_and_replaced(cluster, tiny_path_checkpoint, references):
    """Named by its address it is waited for, and streams with it."""
    (worker,) = cluster.worker_nodes
    with deployed(tiny_path_checkpoint, hosts=1, engine_node="127.0.0.2") as (made, target):

        def kill_and_replace():
            kill_all_of(worker)
            wait_for(lambda: "engines and doors wait for a node: 127.0.0.2" in dict(made.notes).values(), 90, "word")
            cluster.add_node(**NODE, node_ip_address="127.0.0.2")

        once = Once(IN_THE_MIDST, kill_and_replace)
        ask_all(target, references, once, retry_s=200)
        once.wait()
        wait_for(lambda: "engines and doors go to node 127.0.0.2" in dict(made.notes).values(), 120, "its word")
        assert made.lost is None


def test_the_supervisors_node_lost_ends_the_deployment(cluster, tiny_path_checkpoint, monkeypatch):
    """It is not started elsewhere, where doors and sockets are not; what is left on other nodes ends, too."""
    (worker,) = cluster.worker_nodes
    there = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
    monkeypatch.setattr(launch, "NodeAffinitySchedulingStrategy", lambda *_, **__: there)
    with deployed(tiny_path_checkpoint, hosts=2, gpus_per_host=1) as (made, _):
        assert "Supervisor" in kill_all_of(worker)
        wait_for(lambda: made.lost is not None, 120, "the launcher's loss")
        wait_for(lambda: not ray.util.list_named_actors(all_namespaces=True), 60, "the end of all parts")
        assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


class Asking:
    """Clients who ask until the server is gone; what they were given is right as far as it goes."""

    def __init__(self, target, references):
        self.num_tokens, self.tally, self.unknown = 0, Tally(), []
        self._target, self._lock = target, threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(reference,)) for reference in references]
        for thread in self._threads:
            thread.start()

    def _ask(self, reference):
        with Client(self._target, timeout_s=120, retry_s=0) as client:
            while True:
                ids = []
                try:
                    with client.generate(reference.prompt, NUM_TOKENS, ignore_eos=True) as stream:
                        for chunk in stream:
                            ids += chunk.token_ids
                            self.num_tokens += len(chunk.token_ids)
                except PregateError:
                    return
                except Exception as error:  # noqa: BLE001 - the test fails with it
                    self.unknown.append(error)
                    return
                finally:
                    so_far = replace(reference, tokens=reference.tokens[: len(ids)])
                    with self._lock:
                        self.tally.compare_text("text", so_far, ids)

    def wait(self):
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive()
        assert not self.unknown, self.unknown
        self.tally.check()


@pytest.mark.parametrize("what", ["Ctrl-C", "GCS"])
def test_the_end_in_the_midst_of_load_leaves_nothing(tiny_path_checkpoint, references, what):
    """Clients hear of it, `pregate serve` says why it ends, and no process, port, file or shared memory is left."""
    before = shared_memory()
    with serving("--model", tiny_path_checkpoint, "--hosts", 2, "--drain-s", 1) as running:
        ports = listening_ports(processes_of(running.folder))
        asking = Asking(running.target, references)
        wait_for(lambda: asking.num_tokens > IN_THE_MIDST, 120, "tokens")
        if what == "GCS":
            running.children("gcs_server")[0].kill()
            assert running.process.wait(60) == 1
            assert running.log.read_text().splitlines()[-1].startswith("pregate: Ray is lost: its control service at ")
            shutil.rmtree(running.kept_logs.parent)
        else:
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(60) == 0
        asking.wait()
        assert running.wait_nothing_left(60) == []
        assert still_listening(ports) == set()
        assert shared_memory() <= before


def test_a_supervisor_outlives_the_launcher_that_made_it_and_itself(tiny_path_checkpoint, references):
    """Ray makes it anew, and hosts, though the job they began in has ended; the other launcher holds the deployment."""
    arguments = ("--model", str(tiny_path_checkpoint), "--hosts", "2", "--drain-s", "1")
    with serving(*arguments) as first:
        command = [sys.executable, "-m", "pregate.cli.main", "serve", "--grpc-port", "0", *arguments]
        command += ["--ray-address", first.ray_address]
        log = first.folder / "other.log"
        environment = own_environment(first.folder) | {"RAY_AUTH_MODE": "token"}
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)
        other = Running(process, first.folder, log)
        until_said(log, "stop  ", process)
        first.process.kill()
        first.process.wait(30)
        wait_for(lambda: len(first.children("DoorActor")) == 1, 60, "the end of the lease of the first")
        first.children("Supervisor")[0].kill()
        until_said(log, "another one goes on", process, 60)
        ask_all(other.target, references)
        first.children("ExpertHostActor")[0].kill()
        until_said(log, "runs again", process, 60)
        ask_all(other.target, references)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        log.unlink()
        assert first.wait_nothing_left(60) == []
