"""`pregate serve` on one node, its engine and door on another: where they are said to be, their texts, what is left."""

import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import ray
import ray._private.state

from pregate.cli.main import main
from pregate.client.client import Client
from tests.chaos.deployed import ask_all
from tests.chaos.hosts import random_references
from tests.cluster.leftovers import serving
from tests.cluster.ray_nodes import ray_nodes
from tests.router.running import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
THERE = "127.0.0.2"


@pytest.fixture
def access(tmp_path):
    """A certificate for the other node, its key, and a file with a token."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x"]
    command += ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run([*command, "-addext", f"subjectAltName=IP:{THERE}"], check=True, capture_output=True, timeout=60)
    (tmp_path / "tokens").write_text("sk-elsewhere\n")
    return tmp_path


def nodes_of_actors():
    """The node of each kind of actor that is alive."""
    alive = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
    return {one["ActorClassName"]: one["Address"]["NodeID"] for one in alive}


def test_engine_and_door_on_another_node(tiny_path_checkpoint, access, capsys):
    """One host is beside the engine, the other beside the launcher."""
    references = random_references(tiny_path_checkpoint, 23, 4, 24)
    before = set(Path(tempfile.gettempdir()).glob("pregate-ipc-*"))
    node = {"num_cpus": 2, "num_gpus": 1}
    there = {**node, "node_ip_address": THERE, "resources": {"doors": 1}}
    with ray_nodes(node, there, namespace="pregate") as (cluster, (head, other), _):
        asked = ["--model", tiny_path_checkpoint, "--hosts", 2, "--gpus-per-host", 1, "--ray-address", cluster.address]
        asked += ["--engine-node", "doors", "--host", "0.0.0.0", "--tls-cert", access / "cert.pem"]
        asked += ["--tls-key", access / "key.pem", "--token-file", access / "tokens"]
        with serving(*asked) as running:
            assert running.target.startswith(f"{THERE}:")
            assert f"pregate generate --target {running.target} --ca" in running.log.read_text()
            at = nodes_of_actors()
            assert at.pop("Supervisor") == head.node_id
            assert {at.pop(name) for name in ("EngineActor", "DoorActor", "PathActor")} == {other.node_id}
            known = {"token": "sk-elsewhere", "ca": access / "cert.pem"}
            ask_all(running.target, references, **known)
            with Client(running.target, **known) as client:
                assert client.server_info().node == THERE
                nodes = [host.node for host in client.loads().hosts]
            assert len(set(nodes)) == 2 and THERE in nodes
            credentials = ["--ca", str(access / "cert.pem"), "--token-file", str(access / "tokens")]
            assert main(["status", "--target", running.target, *credentials]) == 0
            said = capsys.readouterr().out
            assert f"door and engines on {THERE}\n" in said and f"serves on {THERE}" in said
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(60) == 0, running.log.read_text()
        wait_for(lambda: not nodes_of_actors(), 30, "the end of all parts")
    assert set(Path(tempfile.gettempdir()).glob("pregate-ipc-*")) <= before
