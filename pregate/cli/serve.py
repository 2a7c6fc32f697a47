"""`pregate serve` and `pregate doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from pregate.base.options import options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.router.doors.grpc_options import GrpcOptions


@command(ServeConfig, GrpcOptions, RayAccess)
def serve(config: ServeConfig, door: GrpcOptions, ray_access: RayAccess) -> None:
    """Serve a checkpoint over gRPC from expert hosts that are Ray actors, until Ctrl-C."""
    from pregate.cluster import local_ray

    if ray_access.address is None:
        local_ray.prepare_environment()
    from pregate.cluster import serving

    serving.serve(config, door, ray_access)


@options()
class DoctorOptions:
    """What is to run on this machine."""

    model: Annotated[Path | None, Field(description="Checkpoint folder: does it fit this machine?")] = None
    hosts: Annotated[int, Field(ge=0, description="Expert hosts it is to be served on.")] = 0


@command(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Check this machine: versions, devices, ports, memory; what would fail and how to mend it."""
    from pregate.cluster import doctor as checks

    findings = [*checks.examine_machine()]
    if options.model is not None:
        findings += checks.examine_model(options.model, options.hosts)
    checks.print_findings(findings)
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)
