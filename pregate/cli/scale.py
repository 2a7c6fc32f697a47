"""`pregate scale`: more expert hosts, or fewer, while a deployment serves."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pregate.base.errors import UnavailableError
from pregate.base.options import options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess


@options()
class ScaleOptions:
    """How many hosts a deployment is to have."""

    hosts: Annotated[int, Field(ge=1, description="Expert hosts there are to be.")]
    name: Annotated[str, Field(description="Name of the deployment.")] = "pregate"
    timeout: Annotated[float, Field(gt=0, description="Seconds to wait for it; it goes on afterwards.")] = 600.0


@command(ScaleOptions, RayAccess)
def scale(options: ScaleOptions, ray_access: RayAccess) -> None:
    """Change the number of expert hosts of a running deployment; no request fails or waits for it."""
    from pregate.cluster import calls, joining, local_ray

    local_ray.prepare_environment()
    supervisor = joining.find(options.name, ray_access)
    reply = calls.call(supervisor, "scale", options.hosts, timeout_s=options.timeout)
    if reply.get("failure"):
        raise calls.error_of(reply["failure"])
    if "superseded_by" in reply:
        raise UnavailableError(f"another call asked for {reply['superseded_by']} hosts; there are {reply['hosts']}")
    print(f"{reply['hosts']} hosts serve {options.name}")
