"""`pregate serve` and `pregate doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import Field

from pregate.base.options import Dtype, options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.workers.host.options import HostMemory, ResidentExperts


@command(ServeConfig, GrpcOptions, RayAccess, settings=True)
def serve(config: ServeConfig, door: GrpcOptions, ray_access: RayAccess, _sources: dict[str, str]) -> None:
    """Serve a checkpoint over gRPC from expert hosts that are Ray actors, until Ctrl-C."""
    from pregate.cluster import local_ray

    if ray_access.address is None:
        local_ray.prepare_environment()
    from pregate.cluster import serving

    serving.serve(config, door, ray_access)


@options()
class DoctorOptions:
    """What is to run on this machine, or on a cluster."""

    model: Annotated[Path | None, Field(description="Checkpoint folder: does it fit this machine?")] = None
    hosts: Annotated[int, Field(ge=0, description="Expert hosts it is to be served on.")] = 0
    adapter: Annotated[Path | None, Field(description="Adapter folder in place of --model.")] = None
    parent: Annotated[Path | None, Field(description="The dense model of --adapter.")] = None
    device: Annotated[Literal["cpu", "cuda"], Field(description="What engine and hosts compute on.")] = "cpu"
    dtype: Annotated[Dtype, Field(description="What they compute in.")] = "float32"
    resident_experts: ResidentExperts = None
    host_memory: HostMemory = 0
    grpc_port: Annotated[int, Field(ge=1, le=65535, description="Port of the gRPC server.")] = 50051

    @property
    def config(self) -> dict[str, Any]:
        """As `ServeConfig.from_dict` reads it; without a model `model` is missing."""
        paths = {name: getattr(self, name) for name in ("model", "adapter", "parent")}
        return {
            **{name: str(path.expanduser().resolve()) for name, path in paths.items() if path is not None},
            "hosts": self.hosts,
            "device": self.device,
            "dtype": self.dtype,
            "host": {"resident_experts": self.resident_experts, "host_memory": self.host_memory},
        }


@command(DoctorOptions, RayAccess)
def doctor(options: DoctorOptions, ray_access: RayAccess) -> None:
    """Check this machine, and with --ray-address every node: versions, devices, ports, memory; what would fail and how
    to mend it."""
    from pregate.cluster import doctor as checks

    findings = [*checks.examine_machine(options.grpc_port)]
    if options.model is not None or options.adapter is not None:
        findings += checks.examine_model(options.config, fits_here=ray_access.address is None)
    if ray_access.address is not None:
        findings += checks.examine_cluster(ray_access.address, options.config)
    checks.print_findings(findings)
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)
