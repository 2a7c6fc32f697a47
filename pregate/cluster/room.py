"""Room for a deployment in a cluster: what it asks of Ray, and what a cluster lacks of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pregate.base.errors import UserError, option_name
from pregate.cluster.config import ServeConfig

#: Logical CPUs an actor of ours asks for: they only admit it. What it may use is its own options' matter.
ACTOR_CPUS = 0.1
#: Pins a bundle to a node through the resource Ray gives every node under its address.
NODE_SHARE = 0.001
Resources = Mapping[str, float]


def bundles_of(config: ServeConfig, node_ip: str) -> list[dict[str, float]]:
    """What the engines ask for on the node at `node_ip`, then what each host asks for anywhere."""
    engine = {"CPU": ACTOR_CPUS * config.engines, f"node:{node_ip}": NODE_SHARE}
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
    return f"{hosts}{engines} of {config.engine_gpus:g} GPUs on this node; the cluster has {has}"


def refusal(config: ServeConfig, resource: str, has: str) -> UserError:
    """The error for a cluster that lacks `resource` and cannot grow; `has` is what `describe` says."""
    if resource != "GPU":
        return UserError.of("--hosts", config.hosts, f"too many for this cluster: {has}")
    name = "gpus_per_host" if config.gpus_per_host else "engine_gpus"
    return UserError.of(option_name(name), f"{getattr(config, name):g}", f"not to be had: {has}")
