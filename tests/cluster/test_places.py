"""Where hosts go on a Ray of several nodes."""

import asyncio
from collections import Counter

import pytest

from pregate.cluster.children import RayChildren
from pregate.cluster.config import ServeConfig
from pregate.cluster.places import give_back, host_places, nodes_of
from tests.cluster.ray_nodes import ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


async def placed(config: ServeConfig, folder, hosts: int) -> tuple[list[str], list[str]]:
    """Reserve room for a deployment, then for hosts until there are so many; returns the nodes of the first, and of
    all."""
    children = RayChildren(config, folder)
    try:
        first = host_places(await children._reserve())
        children._hosts._places = list(first)
        await children._hosts.reserve(hosts)
        return nodes_of(first), children._hosts.nodes(hosts)
    finally:
        await children.stop(0)
        give_back(children._hosts._places)


def test_hosts_fill_a_node_or_spread_over_all_of_them(monkeypatch, tmp_path):
    """Three nodes, the engine on the first."""
    monkeypatch.delenv("PREGATE_RUN_DIR", raising=False)
    others = [{"num_cpus": 2, "node_ip_address": f"127.0.0.{n}"} for n in (2, 3)]
    with ray_nodes({"num_cpus": 2}, *others, namespace="pregate") as (_, nodes, folder):
        head, *rest = [node.node_id for node in nodes]
        found = {}
        for host_nodes in ("pack", "spread"):
            config = ServeConfig(model=str(tmp_path), hosts=2, host_nodes=host_nodes)
            found[host_nodes] = asyncio.run(placed(config, folder, 6))
    assert found["pack"][0] == [head, head]
    first, then = found["spread"]
    assert sorted(first) == sorted(rest), "the engine's node comes last"
    assert Counter(then) == {head: 2, rest[0]: 2, rest[1]: 2}, "what is added goes to where fewest are"
