"""The calls of `pregate.v1.Pregate`, on a DoorService."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib import metadata
from platform import python_version
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from pregate import __version__
from pregate.base import log
from pregate.base.completion import Completion
from pregate.base.errors import PregateError, QueueFullError, UserError, logged
from pregate.base.sampling import DEFAULT_MAX_TOKENS
from pregate.base.telemetry import begin_request
from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto.plain import chunk_message, complete_message, given_fields, to_message
from pregate.router.doors.access import cache_salt
from pregate.router.doors.chat import Chat
from pregate.router.doors.prompt_reader import Prompt
from pregate.router.doors.service import DoorService
from pregate.router.link.messages import SamplingParams

logger = log.get_logger(__name__)
SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Pregate"].full_name
#: What a call without a token is told.
NO_TOKEN = "send the metadata `authorization: Bearer TOKEN` with a token this server knows"
#: What the proto says of an absent `max_tokens` of a chat.
CHAT_MAX_TOKENS = 512
#: Of what an operator compares between nodes.
_PACKAGES = ("torch", "transformers", "tokenizers", "ray", "grpcio", "protobuf", "pyzmq")
#: The metadata that names a request, in and out.
_ID_KEY = "x-request-id"
_M = TypeVar("_M", bound=Message)
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """The service's calls. They take bytes: gRPC's own word for a message that cannot be decoded is UNKNOWN.

    `options`, where its processes log, and their node's address, are what GetServerInfo says of them.
    """

    def __init__(self, service: DoorService, options: Mapping[str, str], logs: str = "", node: str = "") -> None:
        self._service, self._options, self._logs, self._node = service, options, logs, node
        self._started_s = time.monotonic()
        self._unary = {
            "Abort": (self.abort, pb.AbortRequest),
            "GetModelInfo": (self.get_model_info, pb.GetModelInfoRequest),
            "GetServerInfo": (self.get_server_info, pb.GetServerInfoRequest),
            "GetLoads": (self.get_loads, pb.GetLoadsRequest),
            "Route": (self.route, pb.RouteRequest),
        }

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a server is to be given."""
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self.answer, name), response_serializer=_serialized
            )
            for name in self._unary
        }
        handlers["Generate"] = grpc.unary_stream_rpc_method_handler(self.generate, response_serializer=_serialized)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def generate(self, message: bytes, context: Context) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with self._answering(context):
            request = _parse(pb.GenerateRequest, message)
            request_id = _request_id(request.request_id)
            stream = self._service.generate(
                _prompt(request),
                _sampling(request),
                deadline_s=_deadline_s(context),
                model=request.model,
                request_id=request_id,
                salt=_caller(context),
                priority=request.priority,
                generated_ids=tuple(request.generated_ids),
                resumes=request.resumes,
                cut=not request.sampling_params.HasField("max_tokens"),
            )
            async with aclosing(stream):
                async for item in stream:
                    if isinstance(item, Completion):
                        yield pb.GenerateResponse(complete=complete_message(item))
                    elif request.stream:
                        yield pb.GenerateResponse(chunk=chunk_message(item))

    async def abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(request_ids=await self._service.abort(request.request_ids, _caller(context)))

    async def get_model_info(self, request: pb.GetModelInfoRequest, _context: Context) -> pb.GetModelInfoResponse:
        info = await self._service.model_info(model=request.model)
        return to_message(
            pb.GetModelInfoResponse,
            info,
            hosts=_hosts(info),
            unit_hits=sum(host["hits"] for host in info["hosts"]),
            unit_misses=sum(host["misses"] for host in info["hosts"]),
            step_costs=None if info["step_costs"] is None else pb.StepCosts(**info["step_costs"]),
            max_context_length=info["max_context"],
        )

    async def get_server_info(self, _request: pb.GetServerInfoRequest, _context: Context) -> pb.GetServerInfoResponse:
        """Answered without the engine, which may be what is missing."""
        return pb.GetServerInfoResponse(
            version=__version__,
            uptime_s=time.monotonic() - self._started_s,
            model=self._service.model_name,
            unavailable=self._service.unavailable,
            versions={"python": python_version(), **_installed()},
            options=self._options,
            logs=self._logs,
            node=self._node,
        )

    async def get_loads(self, _request: pb.GetLoadsRequest, _context: Context) -> pb.GetLoadsResponse:
        info = await self._service.model_info()
        return to_message(
            pb.GetLoadsResponse,
            info,
            hosts=_hosts(info),
            engines=_engines(info),
            path_service=_path_service(info),
            num_requests=self._service.num_requests,
        )

    async def route(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        route = await self._service.route(_prompt(request), deadline_s=_deadline_s(context), model=request.model)
        _, num_layers, num_active = route.shape
        ids = {"expert_ids": route.ids, "num_layers": num_layers, "num_active": num_active}
        return to_message(pb.RouteResponse, route, **ids)

    async def answer(self, name: str, message: bytes, context: Context) -> Message:
        """Answer the call of that name, any but Generate."""
        answer, kind = self._unary[name]
        async with self._answering(context):
            return await answer(_parse(kind, message), context)

    @asynccontextmanager
    async def _answering(self, context: Context) -> AsyncGenerator[None, None]:
        """Turn what goes wrong inside into the status of the call; a bug shows no stack trace to the client."""
        sent = context.invocation_metadata()
        begin_request(_metadata(sent, _ID_KEY), _metadata(sent, "traceparent"))  # each call runs in its own context
        try:
            yield
        except PregateError as error:
            logger.info("%s", logged(error.code, str(error)))
            trailing = ((_ID_KEY, log.request_id.get()),)
            if isinstance(error, QueueFullError):
                trailing = (*trailing, ("retry-after", str(error.retry_after_s)))
            await context.abort(grpc.StatusCode[error.code], str(error), trailing)
        except Exception:
            logger.exception("a call failed by a bug")
            name = log.request_id.get()
            sentence = f"internal error; the server's log has it under {name}"
            await context.abort(grpc.StatusCode.INTERNAL, sentence, ((_ID_KEY, name),))


def authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The `authorization` of a call's metadata, or ""."""
    return _metadata(metadata, "authorization")


def _metadata(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> str:
    return str(dict(metadata or ()).get(key) or "")


def _caller(context: Context) -> str:
    """A name for who calls: of their token and their certificate."""
    identities = b" ".join(context.peer_identities() or ()).hex()
    return cache_salt(authorization(context.invocation_metadata()) + identities)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(kind: type[_M], message: bytes) -> _M:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise UserError(f"the message cannot be decoded as {kind.__name__}") from None


def _request_id(given: str) -> str:
    """The message's id, which names the request from here on; else the one that it has."""
    if given and not log.REQUEST_ID.fullmatch(given):
        raise UserError(f"request_id: must match {log.REQUEST_ID.pattern}")
    return log.name_request(given) if given else log.request_id.get()


def _prompt(request: pb.GenerateRequest | pb.RouteRequest) -> Prompt:
    kind = request.WhichOneof("input")
    if kind is None:
        raise UserError("prompt: missing; give text, tokenized or chat")
    if kind == "chat":
        return Chat([{"role": message.role, "content": message.content} for message in request.chat.messages])
    return request.text if kind == "text" else tuple(request.tokenized.input_ids)


def _sampling(request: pb.GenerateRequest) -> SamplingParams:
    """What is not given is as SamplingParams has it, and the default of a field without presence is that, too."""
    named = given_fields(request.sampling_params)
    bias = tuple(sorted(named.pop("logit_bias", {}).items()))
    most = CHAT_MAX_TOKENS if request.WhichOneof("input") == "chat" else DEFAULT_MAX_TOKENS
    return SamplingParams(**{"max_tokens": most, "logit_bias": bias, **named})


def _deadline_s(context: Context) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else float(remaining_s)


def _hosts(info: Mapping[str, Any]) -> list[pb.HostStatus]:
    return [to_message(pb.HostStatus, host) for host in info["hosts"]]


def _engines(info: Mapping[str, Any]) -> list[pb.EngineStatus]:
    return [to_message(pb.EngineStatus, engine) for engine in info.get("engines", ())]


def _path_service(info: Mapping[str, Any]) -> pb.PathServiceStatus | None:
    said = info.get("path_service")
    return said and to_message(pb.PathServiceStatus, said)


@functools.cache
def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
