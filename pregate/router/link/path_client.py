"""`PathClient`: what a front door holds of the path service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import zmq

from pregate.base.errors import DeadlineError, UnavailableError
from pregate.base.log import get_logger
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.messages import RouteReply

logger = get_logger(__name__)
#: How often it is looked whether another one has come.
_LOOK_S = 0.1


class PathClient(EngineClient):
    """A prompt whose path service is lost is asked of the next one, for which it waits up to `patience_s`: paths are a
    function of the prompt alone, and nothing was told to the client. Who comes while there is none is refused."""

    def __init__(
        self,
        endpoint: str,
        *,
        options: EngineClientOptions | None = None,
        context: zmq.Context | None = None,
        patience_s: float = 60.0,
    ) -> None:
        super().__init__(endpoint, options=options, context=context, name="the path service")
        self._patience_s, self._closing = patience_s, False

    async def close(self) -> None:
        self._closing = True
        await super().close()

    async def route(
        self, token_ids: Sequence[int], deadline_s: float | None = None, with_state: bool = False, traceparent: str = ""
    ) -> RouteReply:
        self._check_available()
        began_s = time.monotonic()
        lost_s: float | None = None
        while True:
            left_s = None if deadline_s is None else deadline_s - (time.monotonic() - began_s)
            if left_s is not None and left_s <= 0:
                raise DeadlineError("the deadline passed before the paths were there")
            try:
                return await super().route(token_ids, left_s, with_state, traceparent)
            except UnavailableError as error:
                now_s = time.monotonic()
                lost_s = lost_s or now_s
                if self._closing or now_s - lost_s >= self._patience_s:
                    raise
                if lost_s == now_s:
                    logger.warning("paths are asked for again: %s", error)
            await asyncio.sleep(_LOOK_S)
