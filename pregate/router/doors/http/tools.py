"""Routes that generate nothing: models, tokens and their texts, paths, and which expert lives where."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response

from pregate.base.errors import NotFoundError
from pregate.router.doors.access import cache_salt
from pregate.router.doors.http.answering import GONE, unless_gone
from pregate.router.doors.http.bodies import DetokenizeBody, RouteBody, TokenizeBody
from pregate.router.doors.http.errors import JsonResponse
from pregate.router.doors.packed_route import PackedRoute
from pregate.router.doors.service import DoorService


def add_routes(app: FastAPI, service: DoorService, timeout_s: float, *, private: bool) -> None:
    """Give `app` the routes; `timeout_s` is the deadline of a route; `private`: to none others' paths."""
    started_s = int(time.time())

    async def card() -> dict[str, Any]:
        info = await service.model_info()
        known = {"id": info["model"], "object": "model", "created": started_s, "owned_by": "pregate"}
        return {**known, "max_model_len": info["max_context"]}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await card()]}

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> dict[str, Any]:
        if model != service.model_name:
            raise NotFoundError.of("model", model, f"is not served here; allowed: {service.model_name}")
        return await card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> JsonResponse:
        ids = await service.tokenize(body.text(), special=body.add_special_tokens, model=body.model)
        tokens = [service.token(i) for i in ids] if body.return_token_strs else None
        most = (await service.model_info())["max_context"]
        return JsonResponse({"count": len(ids), "max_model_len": most, "tokens": list(ids), "token_strs": tokens})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> JsonResponse:
        return JsonResponse({"prompt": await service.detokenize(body.tokens, model=body.model)})

    @app.post("/v1/route")
    async def route(body: RouteBody, request: Request) -> Response:
        """The expert path of every token of a prompt, without a forward pass."""
        work = service.route(body.input(), deadline_s=timeout_s, model=body.model)
        found = await unless_gone(work, request)
        return GONE if found is None else JsonResponse(_route(found, service.model_name))

    @app.get("/experts")
    async def experts() -> JsonResponse:
        """Which unit lives on which host, and what the hosts count, as the engine tells it."""
        info = await service.model_info()
        names = ("num_hosts", "num_layers", "num_experts", "routing", "version", "placement", "hosts")
        return JsonResponse({"model": info["model"], **{name: info[name] for name in names}})

    @app.get("/paths")
    async def paths(request: Request) -> JsonResponse:
        """The paths of the last tokens of the requests that ended last, the newest first: where tokens are asked for,
        of those of the same token alone. From a path its text can be found, by asking for the routes of guesses."""
        salt = cache_salt(request.headers.get("authorization"))
        info = await service.model_info()
        told = [_ended(ended) for ended in reversed(info["last_paths"]) if not private or ended["salt"] == salt]
        return JsonResponse({"model": info["model"], "exact": info["routing"] == "path", "requests": told})


def _route(found: PackedRoute, model: str) -> dict[str, Any]:
    known = {"object": "route", "model": model, "token_ids": list(found.token_ids), "tokens": list(found.tokens)}
    return {**known, "paths": _listed(found.ids, found.shape), "exact": found.exact, "version": found.version}


def _ended(ended: dict[str, Any]) -> dict[str, Any]:
    known = {name: ended[name] for name in ("first", "prompt_tokens", "completion_tokens", "ended_s")}
    return {**known, "paths": _listed(ended["ids"], ended["shape"])}


def _listed(ids: bytes, shape: Sequence[int]) -> list[list[list[int]]]:
    """Expert ids of each token in each layer, of int16 little-endian of `shape` (tokens, layers, k) with -1 padding."""
    ids_TLK = np.frombuffer(ids, "<i2").reshape(shape)
    return [[[i for i in ids if i >= 0] for ids in layers] for layers in ids_TLK.tolist()]
