"""The gRPC front door: `pregate.v1.Pregate`, grpc.health.v1 and reflection on one grpc.aio server."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pregate.base import log
from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.base.errors import PregateError, QueueFullError, UserError
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.doors.access import TokenFile, cache_salt
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.service import DoorService
from pregate.router.link.messages import SamplingParams

logger = log.get_logger(__name__)
SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Pregate"].full_name
DEFAULT_MAX_TOKENS = 64
#: A larger message is refused by gRPC, unread: RESOURCE_EXHAUSTED. Up to here the service says INVALID_ARGUMENT.
_MIN_MESSAGE_BYTES = 4 << 20
#: What a server takes that does not know its engine yet.
_MAX_MESSAGE_BYTES = 64 << 20
#: Pings are not counted against clients, so long silent calls stay up. (The last key is right without "recv".)
_CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the traffic
    # Above its own bound (1,000) gRPC ends calls with a bare CANCELLED; the service refuses them with a reason.
    ("grpc.server.max_pending_requests", 1 << 20),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_REQUEST_ID = re.compile(r"[\w.:@/-]{1,128}", re.ASCII)
_M = TypeVar("_M", bound=Message)
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """Serves a DoorService. Raises UserError for options that cannot work: interface, files, port in use."""

    def __init__(self, service: DoorService, options: GrpcOptions) -> None:
        self._service = service
        self._options = options
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
        server.add_generic_rpc_handlers((_Calls(self._service, self._options).handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        port = self._bind(server)
        await self._set_health(serving=False)
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
            credentials = grpc.ssl_server_credentials([(tls[1], tls[0])])
            return server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            sentence = "cannot be listened on: the port is in use, or the interface or certificate is not usable"
            raise UserError.of("--grpc-port", f"{port} on {access.host}", sentence) from error

    async def _follow_health(self) -> None:
        while True:
            await self._set_health(serving=self._service.unavailable is None)
            await asyncio.sleep(self._options.health_poll_s)

    async def _set_health(self, *, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        for name in ("", SERVICE_NAME):
            await self._health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)


class _Calls:
    """The service's calls. They take bytes: gRPC's own word for a message that cannot be decoded is UNKNOWN."""

    def __init__(self, service: DoorService, options: GrpcOptions) -> None:
        self._service = service
        self._options = options

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a server is to be given."""
        unary = grpc.unary_unary_rpc_method_handler
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, response_serializer=pb.GenerateResponse.SerializeToString
            ),
            "GetModelInfo": unary(self.get_model_info, response_serializer=pb.GetModelInfoResponse.SerializeToString),
            "Route": unary(self.route, response_serializer=pb.RouteResponse.SerializeToString),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def generate(self, message: bytes, context: _Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with self._answering(context):
            request = _parse(pb.GenerateRequest, message)
            request_id = _request_id(request.request_id)
            log.request_id.set(request_id)  # each call runs in a task, and so in a context, of its own
            stream = self._service.generate(
                _prompt(request),
                _sampling(request.sampling_params),
                deadline_s=_deadline_s(context),
                model=request.model,
                request_id=request_id,
                salt=cache_salt(_authorization(context.invocation_metadata())),
                priority=request.priority,
            )
            async with aclosing(stream):
                async for item in stream:
                    if isinstance(item, Completion):
                        yield pb.GenerateResponse(complete=_complete(item))
                    elif request.stream:
                        yield pb.GenerateResponse(chunk=_chunk(item))

    async def get_model_info(self, message: bytes, context: _Context) -> pb.GetModelInfoResponse:
        async with self._answering(context):
            request = _parse(pb.GetModelInfoRequest, message)
            return _model_info(await self._service.model_info(model=request.model))

    async def route(self, message: bytes, context: _Context) -> pb.RouteResponse:
        async with self._answering(context):
            request = _parse(pb.RouteRequest, message)
            route = await self._service.route(_prompt(request), deadline_s=_deadline_s(context), model=request.model)
            return pb.RouteResponse(
                token_ids=route.token_ids,
                tokens=route.tokens,
                num_layers=route.shape[1],
                num_active=route.shape[2],
                expert_ids=route.ids,
                exact=route.exact,
                version=route.version,
            )

    @asynccontextmanager
    async def _answering(self, context: _Context) -> AsyncGenerator[None, None]:
        """Turn what goes wrong inside into the status of the call; a bug shows no stack trace to the client."""
        log.request_id.set(uuid.uuid4().hex)
        try:
            yield
        except PregateError as error:
            trailing = ()
            if isinstance(error, QueueFullError):
                trailing = (("retry-after", str(self._options.retry_after_s)),)
            await context.abort(grpc.StatusCode[error.code], str(error), trailing)
        except Exception:
            logger.exception("a call failed by a bug")
            request_id = log.request_id.get()
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error; the server's log has it under {request_id}")


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
        if self._tokens.accepts(_authorization(handler_call_details.invocation_metadata)):
            return await continuation(handler_call_details)
        return self._refuse

    @staticmethod
    async def _abort(request: object, context: _Context) -> None:
        sentence = "send the metadata `authorization: Bearer TOKEN` with a token this server knows"
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)


def _authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    return str(dict(metadata or ()).get("authorization") or "")


def _parse(kind: type[_M], message: bytes) -> _M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise UserError(f"the message cannot be decoded as {kind.__name__}") from None


def _request_id(given: str) -> str:
    if given and not _REQUEST_ID.fullmatch(given):
        raise UserError(f"request_id: must match {_REQUEST_ID.pattern}")
    return given or uuid.uuid4().hex


def _prompt(request: pb.GenerateRequest | pb.RouteRequest) -> str | tuple[int, ...]:
    kind = request.WhichOneof("input")
    if kind is None:
        raise UserError("prompt: missing; give text or tokenized")
    return request.text if kind == "text" else tuple(request.tokenized.input_ids)


def _sampling(given: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=given.max_tokens if given.HasField("max_tokens") else DEFAULT_MAX_TOKENS,
        temperature=given.temperature,
        top_p=given.top_p if given.HasField("top_p") else 1.0,
        seed=given.seed if given.HasField("seed") else None,
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        top_k=given.top_k,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else None,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=tuple(sorted(given.logit_bias.items())),
        min_tokens=given.min_tokens,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        prompt_logprobs=given.prompt_logprobs if given.HasField("prompt_logprobs") else None,
        stop=tuple(given.stop),
        n=given.n if given.HasField("n") else 1,
    )


def _deadline_s(context: _Context) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else float(remaining_s)


def _logprobs(tokens: Sequence[TokenLogprob]) -> pb.LogProbs | None:
    if not tokens:
        return None
    return pb.LogProbs(
        token_logprobs=[t.logprob for t in tokens],
        token_ids=[t.token_id for t in tokens],
        top_logprobs=[pb.TopLogProbs(values=[v for _, v in t.top], token_ids=[i for i, _ in t.top]) for t in tokens],
    )


def _chunk(chunk: Chunk) -> pb.GenerateStreamChunk:
    return pb.GenerateStreamChunk(
        token_ids=chunk.token_ids,
        prompt_tokens=chunk.prompt_tokens,
        completion_tokens=chunk.completion_tokens,
        text=chunk.text,
        index=chunk.index,
        output_logprobs=_logprobs(chunk.logprobs),
        input_logprobs=_logprobs(chunk.prompt_logprobs),
    )


def _complete(completion: Completion) -> pb.GenerateComplete:
    return pb.GenerateComplete(
        output_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        text=completion.text,
        request_id=completion.request_id,
        rows_per_host=completion.rows_per_host,
        unit_hits=completion.unit_hits,
        unit_misses=completion.unit_misses,
        stall_s=completion.stall_s,
        index=completion.index,
        output_logprobs=_logprobs(completion.logprobs),
        input_logprobs=_logprobs(completion.prompt_logprobs),
    )


def _model_info(info: dict[str, Any]) -> pb.GetModelInfoResponse:
    same = ("vocab_size", "routing", "has_path_router", "num_layers", "num_hosts", "num_running", "num_queued")
    return pb.GetModelInfoResponse(
        **{name: info[name] for name in (*same, "model", "eos_token_ids", "version", "num_steps", "busy_s")},
        **{name: info[name] for name in ("num_step_tokens", "num_step_units")},
        unit_hits=sum(host["hits"] for host in info["hosts"]),
        unit_misses=sum(host["misses"] for host in info["hosts"]),
        hosts=[
            pb.HostStatus(**{f: host[f] for f in pb.HostStatus.DESCRIPTOR.fields_by_name}) for host in info["hosts"]
        ],
        batching=info["batching"],
        step_costs=None if info["step_costs"] is None else pb.StepCosts(**info["step_costs"]),
        max_context_length=info["max_context"],
        unavailable=info["unavailable"] or "",
        busy_with=info["busy_with"] or "",
    )
