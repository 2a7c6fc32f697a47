"""The shell that makes the path service a process of its own: start, status, drain, stop; no logic.

A plain class: the cluster package wraps it with `ray.remote`.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from pregate.base import log
from pregate.router.paths.options import PathOptions

if TYPE_CHECKING:
    from pregate.router.paths.server import PathServer

_POLL_S = 0.05
#: How long the loop may take to notice that it is to stop: one turn.
_STOP_TIMEOUT_S = 10.0


class PathActor:
    """The path router of a checkpoint and its server in one process; it holds no other weights."""

    def __init__(self, options: PathOptions, endpoint: str) -> None:
        log.configure("path service")
        self._options, self._endpoint = options, endpoint
        self._stop_event = threading.Event()
        self._server: PathServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> dict[str, Any]:
        """Load the path router and serve; returns {"endpoint", "pid"} when doors may connect."""
        import torch

        from pregate.model.checkpoint import CheckpointReader
        from pregate.model.path_router import PathComputer
        from pregate.model.quiet import quiet_transformers
        from pregate.router.paths.load import load_router
        from pregate.router.paths.prompts import Prompts
        from pregate.router.paths.server import PathServer

        quiet_transformers()
        torch.set_num_threads(self._options.threads)
        reader = CheckpointReader(self._options.model)
        computer = PathComputer(load_router(reader))
        prompts = Prompts(computer, self._options, reader.config.context_tokens, reader.fingerprint)
        self._server = PathServer(prompts, self._endpoint)
        self._thread = threading.Thread(target=self._server.run, args=(self._stop_event,), name="paths", daemon=True)
        self._thread.start()
        return {"endpoint": self._endpoint, "pid": os.getpid()}

    def status(self) -> dict[str, Any]:
        """`running` turns false when the loop has ended, by `stop` or by a bug (the log has it)."""
        running = self._thread is not None and self._thread.is_alive()
        return {"pid": os.getpid(), "running": running, **(self._server.status() if self._server else {})}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no prompt is left; False when `timeout_s` passes first."""
        give_up_s = time.monotonic() + timeout_s
        while self._server is not None and self.status()["running"] and self._server.has_work:
            if time.monotonic() > give_up_s:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self) -> None:
        """End the loop (prompts left fail with UNAVAILABLE). Repeating it is harmless."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
