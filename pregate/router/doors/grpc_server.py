"""The gRPC front door: `pregate.v1.Pregate`, grpc.health.v1 and reflection on one grpc.aio server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pregate.base.errors import UserError
from pregate.base.options import shown
from pregate.router.doors.access import TokenFile
from pregate.router.doors.grpc_calls import NO_TOKEN, SERVICE_NAME, Calls, Context, authorization
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.service import DoorService

#: A larger message is refused by gRPC, unread: RESOURCE_EXHAUSTED. Up to here the service says INVALID_ARGUMENT.
_MIN_MESSAGE_BYTES = 4 << 20
#: What a server takes that does not know its engine yet.
_MAX_MESSAGE_BYTES = 64 << 20
#: Pings are not counted against clients, so calls that are silent for long stay up. (The key of the interval is right
#: without "recv".) The server pings, too: requests of a client that is gone without a word end.
_CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the traffic
    # Above its own bound (1,000) gRPC ends calls with a bare CANCELLED; the service refuses them with a reason.
    ("grpc.server.max_pending_requests", 1 << 20),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class GrpcServer:
    """Serves a DoorService. Raises UserError for options that cannot work: interface, files, port in use.

    `deployment` are the options of what it is a door of, by their names; GetServerInfo says them with its own, the
    folder of `logs` and the address of the `node`.
    """

    def __init__(
        self,
        service: DoorService,
        options: GrpcOptions,
        deployment: Mapping[str, str] | None = None,
        logs: str = "",
        node: str = "",
    ) -> None:
        self._service = service
        self._options = options
        self._shown, self._here = {**(deployment or {}), **shown(options)}, (logs, node)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - untyped package
        self._server: grpc.aio.Server | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and serve; returns the port."""
        tokens = self._options.access.open_tokens()
        interceptors = [_TokenInterceptor(tokens)] if tokens is not None else []
        most = max(_MIN_MESSAGE_BYTES, self._service.max_message_bytes or _MAX_MESSAGE_BYTES)
        options = (*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", most))
        server = grpc.aio.server(interceptors=interceptors, options=options)
        calls = Calls(self._service, self._shown, *self._here)
        server.add_generic_rpc_handlers((calls.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        port = self._bind(server)
        await self._set_health("", serving=True)
        await self._set_health(SERVICE_NAME, serving=False)
        await server.start()
        self._server = server
        self._service.open()
        self._health_task = asyncio.ensure_future(self._follow_health())
        return port

    async def wait(self) -> None:
        """Return when the server has stopped."""
        assert self._server is not None
        await self._server.wait_for_termination()

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new requests, give those in flight `grace_s`, then end and close the service."""
        if self._server is None:
            return
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        # Refused by us (UNAVAILABLE with a reason) while the port is still open, so no call meets a closed door first.
        await self._service.drain(grace_s)
        await self._service.close()
        await self._server.stop(grace=1.0)

    def _bind(self, server: grpc.aio.Server) -> int:
        access, port = self._options.access, self._options.port
        host = f"[{access.host}]" if ":" in access.host and not access.host.startswith("[") else access.host
        tls = access.read_tls()
        try:
            if tls is None:
                return server.add_insecure_port(f"{host}:{port}")
            certificate, key, client_ca = tls
            credentials = grpc.ssl_server_credentials([(key, certificate)], client_ca, client_ca is not None)
            return server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            sentence = "cannot be listened on: the port is in use, or the interface or certificate is not usable"
            raise UserError.of("--grpc-port", f"{port} on {access.host}", sentence) from error

    async def _follow_health(self) -> None:
        while True:
            await self._set_health("", serving=self._service.lost is None)
            await self._set_health(SERVICE_NAME, serving=self._service.unavailable is None)
            await asyncio.sleep(self._options.health_poll_s)

    async def _set_health(self, name: str, *, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        await self._health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)


class _TokenInterceptor(grpc.aio.ServerInterceptor):
    """Asks every call but health checks for a bearer token."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._refuse = grpc.unary_unary_rpc_method_handler(self._abort)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return await continuation(handler_call_details)
        if self._tokens.accepts(authorization(handler_call_details.invocation_metadata)):
            return await continuation(handler_call_details)
        return self._refuse

    @staticmethod
    async def _abort(request: object, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN)
