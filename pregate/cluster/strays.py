"""What bears a deployment's name in Ray and its supervisor does not know: made in the last moment of one that died."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID  # pyright: ignore[reportPrivateImportUsage]
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pregate.cluster.local_ray import NAMESPACE, our_actors
from pregate.cluster.part import STOP_TIMEOUT_S, settle


def group_name(deployment: str, role: str = "") -> str:
    """The name of a placement group: of the first one, or of one more host's."""
    return f"pregate:{deployment}/{role}"


async def remove_folder(folder: Path, node: str) -> None:
    """Remove a folder on Ray's node of that id, unless that is gone or takes its time."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    removing = ray.remote(_remove).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    await settle(removing.remote(folder), STOP_TIMEOUT_S)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def end_strays(deployment: str, actors: Collection[Any] = (), groups: Collection[PlacementGroup] = ()) -> None:
    """Kill all actors of the deployment but these, and remove all its placement groups but these."""
    for name in our_actors():
        if name.startswith(f"{deployment}/"):
            with contextlib.suppress(ValueError):  # it died meanwhile
                if (actor := ray.get_actor(name, NAMESPACE)) not in actors:
                    ray.kill(actor)
    known = {group.id.hex() for group in groups}
    for number, group in placement_group_table().items():
        ours = group["name"].startswith(group_name(deployment)) and group["state"] != "REMOVED"
        if ours and number not in known:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
