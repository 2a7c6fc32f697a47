"""`pregate serve` and `pregate doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import Field

from pregate.base.options import options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.convert.progress import RichProgress
from pregate.router.doors.grpc_options import GrpcOptions


@command(ServeConfig, GrpcOptions, RayAccess, settings=True)
def serve(config: ServeConfig, door: GrpcOptions, ray_access: RayAccess, _sources: dict[str, str]) -> None:
    """Serve a checkpoint over gRPC from expert hosts that are Ray actors, until Ctrl-C."""
    from pregate.cluster import local_ray, preflight

    preflight.check_device(config)
    if ray_access.address is None:
        local_ray.prepare_environment()
    from pregate.cluster import serving

    serving.serve(config, door, ray_access)


@options()
class Examined(ServeConfig):
    """A deployment of which the model may be left open; what is wrong with its folders is a finding, not an error."""

    model: Annotated[str, Field(description="Checkpoint folder: does it fit this machine?")] = ""
    adapter: Annotated[str | None, Field(description="Adapter folder in place of --model.")] = None
    parent: Annotated[str | None, Field(description="The dense model of --adapter.")] = None


@command(Examined, GrpcOptions, RayAccess, settings=True)
def doctor(config: Examined, door: GrpcOptions, ray_access: RayAccess, _sources: dict[str, str]) -> None:
    """Check this machine, and with --ray-address every node: versions, devices, ports, memory; what would fail and how
    to mend it. Takes the options of `pregate serve`."""
    from pregate.cluster import doctor as checks

    progress = RichProgress()
    with progress.doing("looking at this machine"):
        findings = [*checks.examine_machine(door)]
    if config.model:
        with progress.doing("checking the model"):
            findings += checks.examine_model(config, fits_here=ray_access.address is None)
    if ray_access.address is not None:
        with progress.doing("asking the nodes"):
            findings += checks.examine_cluster(ray_access.address, config)
    checks.print_findings(findings)
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)
