"""Where hosts may run: a bundle of a placement group each, and the node that Ray has put it on."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pregate.base.errors import UnavailableError, UserError
from pregate.cluster import room, run_folder
from pregate.cluster.config import ServeConfig
from pregate.cluster.strays import group_name

#: A placement group and which of its bundles.
Place = tuple[PlacementGroup, int]


async def reserve(config: ServeConfig, num_hosts: int, timeout_s: float, places: Sequence[Place]) -> Place:
    """Room for one more host, for `num_hosts` in all, beside these `places` or away from them, as is configured.
    UserError where a Ray of our own has none, UnavailableError where there is none in time."""
    bundle = room.bundles_of(config, "")[-1]
    if run_folder.own() is not None and room.lacking([bundle], [ray.available_resources()]):
        raise UserError.of("--hosts", num_hosts, "the Ray that was started for this has no room for it")
    name = group_name(config.name, uuid.uuid4().hex[:8])
    node = await asyncio.to_thread(_emptiest_node, bundle, places) if config.host_nodes == "spread" else None
    # The only strategy with a wish for a node, which Ray passes over should there be no room any more.
    group = placement_group([bundle], "STRICT_PACK", name, lifetime="detached", _soft_target_node_id=node)
    try:
        await asyncio.wait_for(wait(group.ready()), timeout_s)
    except BaseException as error:
        remove_placement_group(group)
        if isinstance(error, asyncio.TimeoutError):
            raise UnavailableError(f"no room for another host within {timeout_s:.0f} s") from None
        raise
    return group, 0


def _emptiest_node(bundle: room.Resources, places: Iterable[Place]) -> str | None:
    """Ray's id of the node with room for a bundle that has fewest of these places; None where none has room."""
    free = ray._private.state.available_resources_per_node()
    able = [node for node in free.keys() - draining_nodes() if room.lacking([bundle], [free[node]]) is None]
    taken = Counter(nodes_of(list(places)))
    return min(able, key=lambda node: (taken[node], node), default=None)


def nodes_of(places: Sequence[Place]) -> list[str]:
    """Ray's id of the node each is on; "" while Ray looks for another."""
    tables = {
        group: placement_group_table(group).get("bundles_to_node_id", {}) for group in {group for group, _ in places}
    }
    return [tables[group].get(bundle, "") for group, bundle in places]


def host_places(group: PlacementGroup) -> list[Place]:
    """Those of the first hosts, beside the engines' in one group: of one node side by side, so that host ids follow
    nodes."""
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [(group, bundle) for bundle in sorted(filter(None, nodes), key=lambda index: (nodes[index], index))]


def node_address(node: str) -> str:
    """The address of Ray's node of that id; "" where there is none."""
    return next((one["NodeManagerAddress"] for one in ray.nodes() if one["NodeID"] == node), "")


async def in_thread(ask: Callable[[], str], otherwise: str, timeout_s: float = 5.0) -> str:
    """What Ray answers, asked beside the event loop: while it loses a node an answer takes its time. `otherwise` where
    that is longer than `timeout_s`."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(ask), timeout_s)
    except asyncio.TimeoutError:
        return otherwise


def draining_nodes() -> frozenset[str]:
    """Nodes that are to be taken away, on which Ray starts nothing any more (`ray drain-node`, its autoscaler, a spot
    machine's notice). Ray tells of them by no public call; its own Train asks here."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def give_back(places: Iterable[Place]) -> None:
    """Let Ray have the room again; that of the first hosts is the engine's too, and goes with the deployment."""
    for group, bundle in places:
        if bundle == 0:  # in the first hosts' group that is the engine's
            remove_placement_group(group)


async def wait(reference: Any) -> None:
    """What Ray's references are not by themselves: a coroutine."""
    await reference
