"""Room for a deployment in a cluster: what it asks of Ray, and what a cluster lacks of it. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from pregate.base.errors import UserError, option_name
from pregate.cluster.config import ServeConfig

#: Logical CPUs an actor of ours asks for: they only admit it. What it may use is its own options' matter.
ACTOR_CPUS = 0.1
#: Pins a bundle to a node through the resource Ray gives every node under its address.
NODE_SHARE = 0.001
#: What `engine_node` says of a node that Ray is to choose.
ANY_NODE = "any"
Resources = Mapping[str, float]


def pin_of(engine_node: str) -> dict[str, float]:
    """What keeps engines to such nodes. Examples: {"node:10.0.0.7": 0.001} of "10.0.0.7", {} of "any"."""
    if engine_node == ANY_NODE:
        return {}
    return {f"node:{engine_node}" if is_address(engine_node) else engine_node: NODE_SHARE}


def is_address(engine_node: str) -> bool:
    """Whether it names one node, by the address Ray knows it by."""
    try:
        return bool(ipaddress.ip_address(engine_node))
    except ValueError:
        return False


def bundles_of(config: ServeConfig, node_ip: str) -> list[dict[str, float]]:
    """What the engines ask for where `config.engine_node` says (`node_ip` is this node's address), then what each host
    asks for anywhere."""
    node = node_ip if config.engine_node is None else config.engine_node
    engine = {"CPU": ACTOR_CPUS * config.engines, **pin_of(node)}
    engine["GPU"] = config.engine_gpus * config.engines
    host = {"CPU": ACTOR_CPUS, "GPU": config.gpus_per_host}
    return [{name: share for name, share in part.items() if share} for part in (engine, *[host] * config.hosts)]


def lacking(bundles: Sequence[Resources], nodes: Iterable[Resources]) -> str | None:
    """The resource of which nodes of these totals can never give all bundles enough; None when they can.

    Example: bundles [{"GPU": 1}, {"GPU": 1}] on nodes [{"GPU": 1, "CPU": 8}] lack "GPU".
    """
    nodes = list(nodes)
    for name in sorted({name for bundle in bundles for name in bundle}):
        wanted = [bundle.get(name, 0.0) for bundle in bundles]
        found = [node.get(name, 0.0) for node in nodes]
        if sum(wanted) > sum(found) + 1e-9 or max(wanted) > max(found, default=0.0):
            return name
    return None


def describe(config: ServeConfig, total: Resources, free: Resources) -> str:
    """What is asked and what the cluster has, for people."""
    has = ", ".join(f"{total.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in ("CPU", "GPU"))
    hosts = f"{config.hosts} hosts of {config.gpus_per_host:g} GPUs each and " if config.hosts else ""
    engines = "an engine" if config.engines == 1 else f"{config.engines} engines"
    where = "this node" if config.engine_node is None else f"{config.engine_node} (--engine-node)"
    return f"{hosts}{engines} of {config.engine_gpus:g} GPUs on {where}; the cluster has {has}"


def refusal(config: ServeConfig, resource: str, has: str) -> UserError:
    """The error for a cluster that lacks `resource` and cannot grow; `has` is what `describe` says."""
    if config.engine_node is not None and resource in pin_of(config.engine_node):
        return UserError.of("--engine-node", config.engine_node, f"no such node: {has}")
    if resource != "GPU":
        return UserError.of("--hosts", config.hosts, f"too many for this cluster: {has}")
    name = "gpus_per_host" if config.gpus_per_host else "engine_gpus"
    return UserError.of(option_name(name), f"{getattr(config, name):g}", f"not to be had: {has}")
