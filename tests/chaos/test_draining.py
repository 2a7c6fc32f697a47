"""A Ray node is drained while clients ask: its hosts go elsewhere, no request fails, every text is the reference's."""

import asyncio
import os
import subprocess
import sys

import pytest
import ray

from pregate.base.options import to_dict
from pregate.cluster.children import RayChildren
from pregate.cluster.config import ServeConfig
from pregate.router.doors.grpc_options import GrpcOptions
from tests.chaos.hosts import random_references
from tests.chaos.load import NUM_CLIENTS, Load, look_until
from tests.cluster.ray_nodes import ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DRAIN = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"


def drain(address, node):
    """As `ray drain-node` does it, with the time that a spot machine's notice gives."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice"]
    command = ["drain-node", "--address", address, "--node-id", node, *reason, "--deadline-remaining-seconds", "120"]
    subprocess.run([sys.executable, "-c", DRAIN, *command], check=True, timeout=120)


@pytest.mark.skipif(
    "PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos: what is done is tested in tests/cluster"
)
def test_hosts_leave_a_node_that_is_drained(tiny_path_checkpoint):
    references = random_references(tiny_path_checkpoint, 11, 8, 24)
    config = ServeConfig.from_dict({"model": str(tiny_path_checkpoint), "hosts": 2, "gpus_per_host": 1, "drain_s": 1.0})
    others = [{"num_cpus": 1, "num_gpus": 2, "node_ip_address": f"127.0.0.{n}"} for n in (2, 3)]

    async def main(cluster, nodes, folder):
        children, notes = RayChildren(config, folder), []

        async def until(wanted):
            await look_until(children, notes, wanted)

        try:
            info = await children.start()
            old, new = [node.node_id for node in nodes[1:]]
            if children._hosts.nodes(2) == [new, new]:
                old, new = new, old
            assert children._hosts.nodes(2) == [old, old], "hosts are packed"
            before = {host["pid"] for host in info["hosts"]}
            door = await children.add_door("me", to_dict(GrpcOptions(port=0)))
            with Load(f"127.0.0.1:{door['port']}", references) as load:
                await until(lambda: load.num_texts > NUM_CLIENTS)
                await asyncio.to_thread(drain, cluster.address, old)
                await until(lambda: sum("was moved: Ray is to take its node away" in note for note in notes) == 2)
                seen = load.num_texts
                await until(lambda: load.num_texts > seen + NUM_CLIENTS)
                assert children._hosts.nodes(2) == [new, new]
                assert not before & {host["pid"] for host in children._info["hosts"]}
                await asyncio.to_thread(cluster.remove_node, next(node for node in nodes if node.node_id == old))
                await until(lambda: not [n for n in ray.nodes() if n["NodeID"] == old and n["Alive"]])
                seen = load.num_texts
                await until(lambda: load.num_texts > seen + NUM_CLIENTS)
            assert not [note for note in notes if "a new one is started" in note], notes
        finally:
            await children.stop(1.0)

    with ray_nodes({"num_cpus": 2}, *others, namespace="pregate") as (cluster, nodes, folder):
        asyncio.run(main(cluster, nodes, folder))
