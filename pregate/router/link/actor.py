"""The shell that makes the engine a process of its own: start, status, drain, stop; no logic.

A plain class: the cluster package wraps it with `ray.remote`. That process does not load torch: `start` does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pregate.base import log
from pregate.router.engine.options import EngineOptions

if TYPE_CHECKING:
    import numpy as np

    from pregate.router.link.server import EngineServer
    from pregate.workers.client.host_client import HostClient

_POLL_S = 0.05
#: How long the loop may take to notice that it is to stop: one step.
_STOP_TIMEOUT_S = 30.0


class EngineActor:
    """An engine and its server in one process; the loop has a thread of its own that owns the device."""

    def __init__(self, options: EngineOptions, endpoint: str) -> None:
        import pregate.router.engine.engine  # noqa: F401 - torch is loaded now, while the hosts load their weights

        log.configure("engine")
        self._options = options
        self._endpoint = endpoint
        self._stop_event = threading.Event()
        self._clients: Sequence[HostClient] = ()
        self._server: EngineServer | None = None
        self._thread: threading.Thread | None = None

    def start(self, hosts_of_LR: np.ndarray, make_clients: Callable[[], Sequence[HostClient]]) -> dict[str, Any]:
        """Load the backbone, join the hosts, serve; returns {"endpoint", "info", "pid"} when doors may connect.

        `hosts_of_LR` int16: each unit's home. `make_clients` connects to the hosts, or builds one in this process.
        """
        from pregate.model.quiet import quiet_transformers
        from pregate.router.engine.build import build_engine
        from pregate.router.link.server import EngineServer

        quiet_transformers()
        self._clients = make_clients()
        engine = build_engine(self._options, self._clients, hosts_of_LR)
        self._server = EngineServer(engine, self._endpoint)
        self._thread = threading.Thread(target=self._server.run, args=(self._stop_event,), name="engine", daemon=True)
        self._thread.start()
        return {"endpoint": self._endpoint, "info": engine.info(), "pid": os.getpid()}

    def status(self) -> dict[str, Any]:
        """`running` turns false when the loop has ended, by `stop` or by a bug (the log has it).

        `unavailable` says why requests are refused meanwhile (a lost host, for one), None when they are taken;
        `busy_with` and `busy_s` what is being computed, None when nothing is.
        """
        running = self._thread is not None and self._thread.is_alive()
        return {"pid": os.getpid(), "running": running, **(self._server.status() if self._server else {})}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no request is left; False when `timeout_s` passes first."""
        give_up_s = time.monotonic() + timeout_s
        while self._server is not None and self.status()["running"] and self._server.has_work:
            if time.monotonic() > give_up_s:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self) -> None:
        """End the loop (requests left fail with UNAVAILABLE) and leave the hosts. Repeating it is harmless."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            if self._thread.is_alive():  # it may be using the clients' sockets; the process is about to be ended
                return
        for client in self._clients:
            client.close()
        self._clients = ()
