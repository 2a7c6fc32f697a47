"""`/metrics`: a route for an HTTP application, and a server of its own beside a gRPC door."""

from __future__ import annotations

import asyncio
import socket
import ssl

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pregate.base.errors import UserError
from pregate.router.doors.access import AccessOptions, TokenFile
from pregate.router.doors.door_registry import DoorRegistry
from pregate.router.doors.service import DoorService

_MAX_CONNECTIONS = 64


def metrics_route(service: DoorService, tokens: TokenFile | None = None) -> Route:
    """Return the route; it asks for one of `tokens` where the application does not."""
    registry = DoorRegistry(service)

    async def metrics(request: Request) -> Response:
        if tokens is not None and not tokens.accepts(request.headers.get("authorization")):
            return PlainTextResponse("send the header `Authorization: Bearer TOKEN`\n", 401)
        body, content_type = await registry.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return Route("/metrics", metrics)


class MetricsServer:
    """Serves a door's `/metrics` on the running event loop, under the door's own rules of access."""

    def __init__(self, service: DoorService, access: AccessOptions) -> None:
        route = metrics_route(service, access.open_tokens())
        self._access = access
        self._server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=[route]),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                ssl_certfile=access.tls_cert,
                ssl_keyfile=access.tls_key,
                ssl_ca_certs=None if access.tls_client_ca is None else str(access.tls_client_ca),
                ssl_cert_reqs=ssl.CERT_NONE if access.tls_client_ca is None else ssl.CERT_REQUIRED,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self, port: int) -> int:
        """Listen; returns the port. Raises UserError where it is taken."""
        host = self._access.host.strip("[]")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise UserError.of(
                "--metrics-port", f"{port} on {host}", f"cannot be listened on ({error.strerror})"
            ) from error
        self._task = asyncio.ensure_future(self._server.serve([listener]))
        return listener.getsockname()[1]

    async def stop(self) -> None:
        """Close; a scrape in progress is cut off."""
        if self._task is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._task
