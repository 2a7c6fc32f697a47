"""`ray up` on machines of one's own, as deploy/ray-up.md says it: up, doctor, serve, serve deploy, down.

The machines are namespaces of this one (machines.py), each with an ssh server; the disk is shared.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.deploy.machines import ROOT, machines, need_machines

QUARTET = ROOT / "examples" / "quartet-paths"
PROMPT = "Once upon a time"
pytestmark = pytest.mark.skipif(
    "PREGATE_CHAOS_KILLS" not in os.environ, reason="takes minutes; run by `make chaos`, where sshd and rsync are"
)


@pytest.fixture(scope="module")
def cluster():
    """(desk, head, worker): a cluster that `ray up` on the desk made of head and worker; `ray down` at the end."""
    need_machines()
    with machines("desk", "head", "worker") as (desk, head, worker):
        for machine in (desk, head, worker):
            machine.run(
                f"mkdir -p ~/pregate-env; ln -s {Path(sys.prefix) / 'bin'} ~/pregate-env/bin;"
                f"echo export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE > ~/.bashrc"
            )
        config = yaml.safe_load((ROOT / "deploy" / "ray-cluster-local.yaml").read_text())
        config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": f"{desk.folder}/key"}
        config |= {"min_workers": 1, "max_workers": 1}
        config["file_mounts"].pop("~/pregate-wheel")  # nothing is installed: the disk is shared
        config["setup_commands"] = [c for c in config["setup_commands"] if "pip" not in c]
        # A GPU each, in name: then a host goes where its GPU is, as it would.
        for role in ("head", "worker"):
            stop, start = config[f"{role}_start_ray_commands"]
            config[f"{role}_start_ray_commands"] = [stop, f"{start} --num-gpus=1"]
        file = desk.folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(config))
        desk.run("umask 077; ray get-auth-token --generate")
        desk.run(f"ray up --yes {file}")
        _wait_for(lambda: _nodes(head) == 2, "the worker", 120)
        yield desk, head, worker
        desk.run(f"ray down --yes {file}")
        assert "raylet" not in head.run("ps aux")  # a worker's ends when it has missed the head for a while


@pytest.mark.ray
@pytest.mark.slow
def test_doctor_finds_what_one_node_lacks(cluster):
    _, head, worker = cluster
    command = f"pregate doctor --ray-address auto --model {QUARTET} --hosts 2"
    said = head.run(command)
    assert re.search(f"ok   node {head.address} +head: ", said)
    assert re.search(f"ok   node {worker.address} +worker: ", said)
    worker.run(f"mount -t tmpfs tmpfs {QUARTET}; mount -o remount,size=64m /dev/shm")
    said = head.run(command, check=False)
    worker.run(f"umount {QUARTET}; mount -o remount,size=8g /dev/shm")
    assert re.search(f"ok   node {head.address}", said)
    assert re.search(f"FAIL node {worker.address} +{QUARTET}", said), said
    assert re.search(f"warn node {worker.address} +0.07 GB of /dev/shm", said), said


@pytest.mark.ray
@pytest.mark.slow
def test_serve_over_two_nodes(cluster):
    desk, head, worker = cluster
    file = desk.folder / "cluster.yaml"
    options = f"--model {QUARTET} --hosts 2 --gpus-per-host 1 --ray-address auto"
    served = desk.start(f"ray exec {file} 'pregate serve {options}'")
    _wait_for(lambda: "stop     Ctrl-C" in served.text(), "pregate serve", 180, served)
    ask = f"pregate generate --target 127.0.0.1:50051 --prompt '{PROMPT}' --max-tokens 8"
    texts = [head.run(ask), head.run(ask)]
    assert texts[0] == texts[1]
    assert texts[0].strip()
    status = json.loads(head.run("pregate status --target 127.0.0.1:50051 --json").splitlines()[-1])
    assert status["model"]["num_hosts"] == 2
    assert "ExpertHostActor" in worker.run("ps aux"), "no host on the worker"
    head.run("pkill -INT -f '^[^ ]*python[^ ]* [^ ]*/pregate serve'")  # of this machine; not the shell that runs it
    _wait_for(lambda: served.process.poll() is not None, "the end of pregate serve", 60, served)
    assert served.process.returncode == 0, served.text()
    assert "ExpertHostActor" not in worker.run("ps aux") + head.run("ps aux")


@pytest.mark.ray
@pytest.mark.slow
def test_serve_from_the_worker(cluster):
    """Engine and door on the worker, asked from the head at the worker's address; nothing of them stays there."""
    desk, head, worker = cluster
    folder = desk.folder
    certify = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=x"
    certify += f" -addext subjectAltName=IP:{worker.address} -keyout {folder}/door.key -out {folder}/door.pem"
    desk.run(f"{certify}; echo sk-worker > {folder}/tokens")
    options = f"--model {QUARTET} --hosts 2 --gpus-per-host 1 --ray-address auto --engine-node {worker.address}"
    options += f" --host 0.0.0.0 --tls-cert {folder}/door.pem --tls-key {folder}/door.key --token-file {folder}/tokens"
    served = desk.start(f"ray exec {folder}/cluster.yaml 'pregate serve {options}'")
    _wait_for(lambda: "stop     Ctrl-C" in served.text(), "pregate serve", 180, served)
    assert f"gRPC     {worker.address}:50051" in served.text()
    known = f"--target {worker.address}:50051 --ca {folder}/door.pem --token-file {folder}/tokens"
    texts = [head.run(f"pregate generate {known} --prompt '{PROMPT}' --max-tokens 8") for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].strip()
    status = json.loads(head.run(f"pregate status {known} --json").splitlines()[-1])
    assert status["server"]["node"] == worker.address
    assert {host["node"] for host in status["loads"]["hosts"]} == {head.address, worker.address}
    assert "EngineActor" in worker.run("ps aux") and "EngineActor" not in head.run("ps aux")
    assert "engine" in worker.run("ls /tmp/pregate-ipc-*")
    head.run("pkill -INT -f '^[^ ]*python[^ ]* [^ ]*/pregate serve'")
    _wait_for(lambda: served.process.poll() is not None, "the end of pregate serve", 60, served)
    assert served.process.returncode == 0, served.text()
    assert not worker.run("ls -d /tmp/pregate-ipc-* 2>/dev/null", check=False).strip()


def _nodes(head) -> int:
    found = re.findall(r"^ 1 node_\w+|^ (\d+) local.cluster.node", head.run("ray status", check=False), re.M)
    return sum(int(n or 1) for n in found)


def _wait_for(question, what: str, timeout_s: float, started=None) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not question():
        said = started.text()[-2000:] if started else ""
        assert time.monotonic() < give_up_s, f"{what} did not come: {said}"
        time.sleep(1)
