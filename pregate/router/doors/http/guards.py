"""What a request gets past before anything of its body is read: its name, who sends it, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Container

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pregate.base.telemetry import begin_request
from pregate.router.doors.access import TokenFile
from pregate.router.doors.http.errors import error_body, response

#: What a door takes that does not know its engine yet.
_MAX_BODY_BYTES = 64 << 20
_WHO = "send the header `Authorization: Bearer TOKEN` with a token this server knows"


class Named:
    """Names a request in logs and errors by its header x-request-id, which Serve makes where a client sends none, and
    takes its traceparent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            begin_request(headers.get("x-request-id"), headers.get("traceparent"))
        await self._app(scope, receive, send)


class Authorized:
    """Asks for a token of `tokens`, but for the paths in `open_paths`."""

    def __init__(self, app: ASGIApp, tokens: TokenFile, open_paths: Container[str]) -> None:
        self._app, self._tokens, self._open = app, tokens, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            header = Headers(scope=scope).get("authorization")
            if path not in self._open and not self._tokens.accepts(header):
                await response(error_body("UNAUTHENTICATED", _WHO))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BoundedBody:
    """Refuses a body that is larger than any prompt that fits the context, without reading it to its end.

    `most` says how many bytes that are, or None while nobody knows.
    """

    def __init__(self, app: ASGIApp, most: Callable[[], int | None]) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self._most() or _MAX_BODY_BYTES
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise HTTPException(413, f"body of {num_bytes} bytes or more: allowed: {most}")
            return message

        stated = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if stated.isdecimal() and int(stated[:20]) > most:
            refusal = response(error_body("INVALID_ARGUMENT", f"body of {stated[:20]} bytes: allowed: {most}"), 413)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, bounded, send)
