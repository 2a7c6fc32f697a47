"""`pregate.v1.Pregate` through Serve's own gRPC proxy, which calls a replica's methods by the names of the calls.

The proxy listens on every interface, in plaintext, and knows no interceptors, so each call asks for a token here, and
without a `token_file` all are refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import Message

from pregate.base.errors import PregateError
from pregate.router.doors.access import TokenFile
from pregate.router.doors.grpc_calls import NO_TOKEN, Calls, authorization

_NO_FILE = "this application has no token_file, and Serve's gRPC port is open to the network: give it one"


class _EndedError(PregateError):
    """The status is in Serve's context; Serve sends it when the call raises."""


class _Context:
    """What `Calls` needs of gRPC's context, over Serve's; a call has `timeout_s`, as its deadline is not told."""

    def __init__(self, given: Any, timeout_s: float) -> None:
        self._given, self._timeout_s = given, timeout_s

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._given.invocation_metadata()

    def peer_identities(self) -> None:
        return None

    def time_remaining(self) -> float:
        return self._timeout_s

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, str]] = ()) -> None:
        self._given.set_code(code)
        self._given.set_details(details)
        self._given.set_trailing_metadata([*self._given.trailing_metadata(), *trailing])
        raise _EndedError(details)


class GrpcMethods:
    """The calls, for a replica to inherit; `serve_grpc` says of what."""

    _calls: Calls

    def serve_grpc(self, calls: Calls, tokens: TokenFile | None, timeout_s: float) -> None:
        """Answer from `calls` whoever has one of `tokens`."""
        self._calls, self._grpc_tokens, self._grpc_timeout_s = calls, tokens, timeout_s

    async def Generate(self, message: Message, grpc_context: Any) -> AsyncGenerator[Message, None]:  # noqa: N802
        context = await self._let_in(grpc_context)
        async with aclosing(self._calls.generate(message.SerializeToString(), context)) as answers:
            async for answer in answers:
                yield answer

    async def Abort(self, message: Message, grpc_context: Any) -> Message:  # noqa: N802
        return await self._answer("Abort", message, grpc_context)

    async def GetModelInfo(self, message: Message, grpc_context: Any) -> Message:  # noqa: N802
        return await self._answer("GetModelInfo", message, grpc_context)

    async def GetServerInfo(self, message: Message, grpc_context: Any) -> Message:  # noqa: N802
        return await self._answer("GetServerInfo", message, grpc_context)

    async def GetLoads(self, message: Message, grpc_context: Any) -> Message:  # noqa: N802
        return await self._answer("GetLoads", message, grpc_context)

    async def Route(self, message: Message, grpc_context: Any) -> Message:  # noqa: N802
        return await self._answer("Route", message, grpc_context)

    async def _answer(self, name: str, message: Message, grpc_context: Any) -> Message:
        return await self._calls.answer(name, message.SerializeToString(), await self._let_in(grpc_context))

    async def _let_in(self, grpc_context: Any) -> Any:
        context = _Context(grpc_context, self._grpc_timeout_s)
        if self._grpc_tokens is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, _NO_FILE)
        elif not self._grpc_tokens.accepts(authorization(context.invocation_metadata())):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN)
        return context
