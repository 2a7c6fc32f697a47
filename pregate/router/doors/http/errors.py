"""OpenAI's error bodies, and the handlers that make every failure one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from pregate.base import log
from pregate.base.errors import PregateError, QueueFullError, UserError, field_of, logged

logger = log.get_logger(__name__)
#: Status of ours -> HTTP status, and what OpenAI calls the kind of error.
_HTTP: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "INVALID_ARGUMENT": (400, "invalid_request_error"),
        "UNAUTHENTICATED": (401, "authentication_error"),
        "NOT_FOUND": (404, "not_found_error"),
        "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
        "INTERNAL": (500, "server_error"),
        "DATA_LOSS": (500, "server_error"),
        "UNAVAILABLE": (503, "service_unavailable_error"),
        "DEADLINE_EXCEEDED": (504, "timeout_error"),
    }
)


class JsonResponse(Response):
    """JSON that any text can be written in: half a surrogate pair, which a client may send, has no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's body, and in it the request's id. `code` is the gRPC status of the same error, in small letters.

    It is logged, but for what was sent: whoever is told of an error finds it there.
    """
    logger.info("%s", logged(code, message))
    error = {"message": message, "type": _HTTP[code][1], "param": param, "code": code.lower()}
    return {"error": {**error, "request_id": log.request_id.get()}}


def error_of(error: Exception) -> dict[str, Any]:
    """Return the body of what went wrong; a bug is logged, and shows nothing of itself."""
    if isinstance(error, PregateError):
        field = field_of(str(error)) if error.code == "INVALID_ARGUMENT" else None
        return error_body(error.code, str(error), field)
    logger.error("a request failed by a bug", exc_info=error)
    return error_body("INTERNAL", f"internal error; the server's log has it under {log.request_id.get()}")


def response(body: dict[str, Any], status: int | None = None, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """Return the response of an error's body, with the headers that belong to it."""
    code = body["error"]["code"].upper()
    extra = {
        "RESOURCE_EXHAUSTED": {"Retry-After": str(QueueFullError.retry_after_s)},
        "UNAUTHENTICATED": {"WWW-Authenticate": "Bearer"},
    }
    return JsonResponse(body, status or _HTTP[code][0], {**(headers or {}), **extra.get(code, {})})


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer everything that goes wrong in OpenAI's shape."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (PregateError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(_: Request, error: Exception) -> Response:
    return response(error_of(error))


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "NOT_FOUND" if error.status_code == 404 else "INVALID_ARGUMENT"
    return response(error_body(code, str(error.detail)), error.status_code, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if isinstance(ours := first.get("ctx", {}).get("error"), UserError):
        return response(error_of(ours))
    return response(error_of(UserError("body: must be a JSON object")))
