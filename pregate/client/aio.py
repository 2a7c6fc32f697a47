"""`AsyncClient`: `Client` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from typing_extensions import Unpack

from pregate.base.completion import Chunk, Completion
from pregate.base.errors import PregateError
from pregate.client.answers import Loads, ModelInfo, Route, ServerInfo, read, read_route
from pregate.client.caller import Caller, Running
from pregate.client.client import READINESS
from pregate.client.options import (
    GenerateOptions,
    Prompt,
    build,
    prompt_field,
)
from pregate.client.proto import pregate_pb2 as pb


class AsyncGeneration(Running, AsyncIterator[Chunk]):
    """`Generation` for asyncio: `async for` gives its chunks, and its names mean the same."""

    def _begin(self) -> None:
        self._cancelled = False
        self._call = self._send()
        self._responses = aiter(self._call)

    async def __anext__(self) -> Chunk:
        while not self._cancelled:
            try:
                chunk = self._progress.take(await anext(self._responses))
            except grpc.RpcError as status:
                if not self._cancelled:
                    await asyncio.sleep(await asyncio.to_thread(self._attempts.wait_s, status))
                if not self._cancelled:
                    self._progress.resume()
                    self._call = self._send()
                    self._responses = aiter(self._call)
                continue
            except asyncio.CancelledError:
                if not self._cancelled:  # else it is the call that was
                    raise
                continue
            if chunk is not None:
                self._attempts.succeeded()
                return chunk
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Stop the request on the server; the iteration ends. A finished one is left as it is."""
        self._cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient(Caller[AsyncGeneration]):
    """`Client` for asyncio: its arguments and its methods, to be awaited; for one event loop, in which it is used."""

    _library, _generation = grpc.aio, AsyncGeneration

    async def complete(
        self, prompt: Prompt, max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generate and wait for the whole."""
        options["stream"] = False
        async with self.generate(prompt, max_tokens, **options) as generation:
            async for _ in generation:
                pass
        if generation.completion is None:
            raise PregateError(f"{self._connection.target}: the stream ended without a completion")
        return generation.completion

    async def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests of the same token at the server that was asked last; returns the ids of those that ran."""
        return tuple((await self._unary("Abort", build(pb.AbortRequest, request_ids=request_ids))).request_ids)

    async def route(self, prompt: Prompt, *, model: str = "") -> Route:
        """Return the expert path of every prompt token, without a forward pass."""
        return read_route(await self._unary("Route", build(pb.RouteRequest, model=model, **prompt_field(prompt))))

    async def model_info(self, *, model: str = "") -> ModelInfo:
        """Return what the server serves."""
        return read(ModelInfo, await self._unary("GetModelInfo", build(pb.GetModelInfoRequest, model=model)))

    async def server_info(self) -> ServerInfo:
        """Return what the server is; it answers without its engine, too."""
        return read(ServerInfo, await self._unary("GetServerInfo", pb.GetServerInfoRequest()))

    async def loads(self) -> Loads:
        """Return how busy the server is."""
        return read(Loads, await self._unary("GetLoads", pb.GetLoadsRequest()))

    async def health(self, service: str = READINESS) -> bool:
        """Return whether the server takes requests, or, of service "", lives.

        Asked once: raises UnavailableError when nothing answers at the target.
        """
        attempts = self._connection.attempts()
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = await self._connection.health.Check(request, **attempts.begin())
        except grpc.RpcError as status:
            error = await asyncio.to_thread(self._connection.error_of, status, self._connection.target)
            raise error from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Close the connection; running requests end."""
        for channel in self._connection.take_channels():
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, method: str, request: Any) -> Any:
        attempts = self._connection.attempts()
        while True:
            try:
                return await getattr(self._connection.stub, method)(request, **attempts.begin())
            except grpc.RpcError as status:
                await asyncio.sleep(await asyncio.to_thread(attempts.wait_s, status))
