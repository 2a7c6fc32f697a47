"""`GrpcOptions`: the gRPC front door's; loads nothing heavy."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from pregate.base.options import Key, Word, options
from pregate.router.doors.access import AccessOptions


@options()
class GrpcOptions:
    """Port 0 picks a free one. `/metrics` is served on the same interface under the same rules of access."""

    port: Annotated[
        int, Field(ge=0, le=65535, description="Port of the gRPC server; 0 picks a free one."), Key("grpc_port")
    ] = 50051
    metrics_port: Annotated[
        int | None, Field(ge=1, le=65535, description="Port of /metrics for Prometheus."), Word("off", written=False)
    ] = None
    access: AccessOptions = field(default_factory=AccessOptions)
    health_poll_s: Annotated[float, Field(gt=0, description="Seconds between looks at the engine's health.")] = 0.25
