"""What bears a deployment's name in Ray and its supervisor does not know: made in the last moment of one that died."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import ray
from ray._raylet import PlacementGroupID  # pyright: ignore[reportPrivateImportUsage]
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from pregate.cluster.local_ray import NAMESPACE, our_actors


def group_name(deployment: str, role: str = "") -> str:
    """The name of a placement group: of the first one, or of one more host's."""
    return f"pregate:{deployment}/{role}"


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
