"""The actors of a deployment, as Ray is asked for them: they outlive the supervisor's process, but not its actor."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ray
import ray.util
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pregate.cluster import room
from pregate.cluster.config import ServeConfig
from pregate.cluster.local_ray import NAMESPACE
from pregate.cluster.places import Place

#: How often an actor looks whether the one it is tied to is there, or will be again.
LOOK_EVERY_S = 5.0


def actor_options(config: ServeConfig, role: str, place: Place, num_gpus: float) -> dict[str, Any]:
    """Ray's options of an actor, which outlives the process that makes it; `tied` sees to its end."""
    return {
        "name": f"{config.name}/{role}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": room.ACTOR_CPUS,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(*place),
    }


def actor_name(role: str, num_before: int) -> str:
    """The actor's name: those before may still be dying under theirs."""
    return f"{role}-again-{num_before}" if num_before else role


async def start_actor(actor: Any) -> Any:
    """Bring an actor up that needs nothing for it."""
    return await actor.start.remote()


def tied(actor_class: type) -> Any:
    """`ray.remote` of a class whose actors end, and with them their placement groups, when the actor that makes them is
    dead for good. Those of a process that is no actor are tied to nobody."""
    name = ray.get_runtime_context().get_actor_name()
    if not name:
        return ray.remote(actor_class)

    class Tied(actor_class):
        def __init__(self, *arguments: Any) -> None:
            threading.Thread(target=_end_with, args=(name,), name="pregate-tie", daemon=True).start()
            super().__init__(*arguments)

    Tied.__name__ = Tied.__qualname__ = actor_class.__name__
    return ray.remote(Tied)


def _end_with(name: str) -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        try:
            ray.get_actor(name, NAMESPACE)
        except ValueError:  # Ray knows of none: not even one that it starts again
            break
        except Exception:  # noqa: BLE001 - Ray does not answer; it ends us itself when it is gone
            continue
    if (group := ray.util.get_current_placement_group()) is not None:
        remove_placement_group(group)
    os._exit(1)
