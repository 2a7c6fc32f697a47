"""`Client`: text, token ids or chats in; streamed text, completions and expert paths out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from typing_extensions import Unpack

from pregate.base.completion import Chunk, Completion
from pregate.base.errors import PregateError
from pregate.client.answers import Loads, ModelInfo, Route, ServerInfo, read, read_route
from pregate.client.caller import Caller, Running
from pregate.client.options import (
    GenerateOptions,
    Prompt,
    build,
    prompt_field,
)
from pregate.client.proto import pregate_pb2 as pb

READINESS = pb.DESCRIPTOR.services_by_name["Pregate"].full_name


class Generation(Running, Iterator[Chunk]):
    """A running request: iterate for its chunks; `completion` is set when the iteration has ended, of `n` the first,
    and `completions` are all, in the order they ended.

    A stream that breaks is resumed; nothing comes twice. `cancel`, or leaving a `with` block, gives the request up.
    """

    def _begin(self) -> None:
        self._cancelled = threading.Event()
        self._call = self._send()

    def __next__(self) -> Chunk:
        while True:
            try:
                chunk = self._progress.take(next(self._call))
            except grpc.RpcError as status:
                if self._cancelled.is_set() or self._cancelled.wait(self._attempts.wait_s(status)):
                    raise StopIteration from None
                self._progress.resume()
                self._call = self._send()
                continue
            if chunk is not None:  # what holds no tokens is no success: a stream may break after it for ever
                self._attempts.succeeded()
                return chunk

    def cancel(self) -> None:
        """Stop the request on the server; the iteration ends. A finished one is left as it is."""
        self._cancelled.set()
        self._call.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Client(Caller[Generation]):
    """Talks to a pregate server at `target` (`HOST:PORT`), or to the first of several that answers.

    `ca` (a PEM file) turns TLS on, `cert` and `key` show the server a certificate, `token` is sent with every call,
    `timeout_s` is each call's deadline. A call that meets UNAVAILABLE is sent again, elsewhere where there are several
    targets, until it has met nothing else for `retry_s` (0: each target once), which is logged; a broken stream goes on
    where it was.

    Methods raise the errors of pregate.base.errors: UserError, NotFoundError, QueueFullError, UnavailableError,
    DeadlineError, DataLossError, PregateError. Threads may share a client. Close it, or use it in a `with` block. For
    asyncio there is `AsyncClient`.
    """

    _library, _generation = grpc, Generation

    def complete(self, prompt: Prompt, max_tokens: int | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate and wait for the whole."""
        options["stream"] = False
        with self.generate(prompt, max_tokens, **options) as generation:
            for _ in generation:
                pass
        if generation.completion is None:
            raise PregateError(f"{self._connection.target}: the stream ended without a completion")
        return generation.completion

    def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests of the same token at the server that was asked last; returns the ids of those that ran."""
        request = build(pb.AbortRequest, request_ids=request_ids)
        return tuple(self._unary("Abort", request).request_ids)

    def route(self, prompt: Prompt, *, model: str = "") -> Route:
        """Return the expert path of every prompt token, without a forward pass."""
        return read_route(self._unary("Route", build(pb.RouteRequest, model=model, **prompt_field(prompt))))

    def model_info(self, *, model: str = "") -> ModelInfo:
        """Return what the server serves."""
        return read(ModelInfo, self._unary("GetModelInfo", build(pb.GetModelInfoRequest, model=model)))

    def server_info(self) -> ServerInfo:
        """Return what the server is; it answers without its engine, too."""
        return read(ServerInfo, self._unary("GetServerInfo", pb.GetServerInfoRequest()))

    def loads(self) -> Loads:
        """Return how busy the server is."""
        return read(Loads, self._unary("GetLoads", pb.GetLoadsRequest()))

    def health(self, service: str = READINESS) -> bool:
        """Return whether the server takes requests, or, of service "", lives.

        Asked once: raises UnavailableError when nothing answers at the target.
        """
        attempts = self._connection.attempts()
        try:
            reply = self._connection.health.Check(health_pb2.HealthCheckRequest(service=service), **attempts.begin())
        except grpc.RpcError as status:
            raise self._connection.error_of(status, self._connection.target) from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the connection; running requests end."""
        for channel in self._connection.take_channels():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, method: str, request: Any) -> Any:
        attempts = self._connection.attempts()
        while True:
            try:
                return getattr(self._connection.stub, method)(request, **attempts.begin())
            except grpc.RpcError as status:
                time.sleep(attempts.wait_s(status))
