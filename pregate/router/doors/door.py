"""The shell that makes a gRPC front door a process of its own, on one event loop; it never loads torch.

A plain class: the cluster package wraps it with `ray.remote`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pregate.base.telemetry import PLAIN, Telemetry, flush
from pregate.router.doors.connect import connect_service
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.request_watch import Recorder

if TYPE_CHECKING:
    from pregate.router.doors.metrics_app import MetricsServer


class DoorActor:
    """A gRPC front door in a process of its own, on one event loop."""

    def __init__(
        self,
        engine_endpoints: Sequence[str],
        path_endpoint: str | None,
        tokenizer_dir: str,
        model_name: str,
        options: GrpcOptions,
        deployment: Mapping[str, str] | None = None,
        find_here: Callable[[], tuple[str, str]] = lambda: ("", ""),
        telemetry: Telemetry = PLAIN,
        make_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        """`find_here` says where this process is, once it is: its node's address and its folder of logs.
        `make_recorder` gives what the door's numbers go to besides its own `/metrics`."""
        telemetry.begin("door")
        self._options = options
        self._service = connect_service(engine_endpoints, path_endpoint, tokenizer_dir, model_name)
        if make_recorder is not None:
            self._service.metrics.recorders.append(make_recorder())
        self._node, logs = find_here()
        self._server = GrpcServer(self._service, options, deployment, logs, self._node)
        self._metrics: MetricsServer | None = None
        self._listens = False

    async def start(self) -> dict[str, Any]:
        """Listen; returns {"host", "port", "pid", "node"} when the engine answers: health is true from the start.

        Raises UserError when the port is in use, UnavailableError without an answer from the engine.
        """
        await self._service.model_info()
        if self._options.metrics_port is not None:
            from pregate.router.doors.metrics_app import MetricsServer

            self._metrics = MetricsServer(self._service, self._options.access)
            await self._metrics.start(self._options.metrics_port)
        port = await self._server.start()
        self._listens = True
        return {"host": self._options.access.host, "port": port, "pid": os.getpid(), "node": self._node}

    async def status(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "running": self._listens}

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse what is new, let what runs end within `grace_s`, close."""
        await self._server.stop(grace_s)
        if self._metrics is not None:
            await self._metrics.stop()
        await asyncio.to_thread(flush)
