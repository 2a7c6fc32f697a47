"""The shell that makes the engine a process of its own: start, status, drain, stop; no logic.

A plain class: the cluster package wraps it with `ray.remote`. That process does not load torch: `start` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pregate.base.cores import pin
from pregate.base.huge_pages import collapse_later
from pregate.base.telemetry import PLAIN, Telemetry
from pregate.router.engine.options import EngineOptions
from pregate.router.link.loop_actor import Export, LoopActor

if TYPE_CHECKING:
    import numpy as np

    from pregate.router.engine.engine import Engine
    from pregate.router.link.server import EngineServer
    from pregate.workers.client.host_client import HostClient


#: Longest wait for a step to end.
CALL_TIMEOUT_S = 30.0


class EngineActor(LoopActor):
    """An engine and its server in one process; the loop has a thread of its own that owns the device. `number` where
    there are several."""

    stop_timeout_s = 30.0  # one step

    def __init__(
        self,
        options: EngineOptions,
        endpoint: str,
        telemetry: Telemetry = PLAIN,
        export: Export | None = None,
        number: int | None = None,
    ) -> None:
        """What is exported is what `EngineClient.info` says."""
        super().__init__(endpoint, export)
        import pregate.router.engine.engine  # noqa: F401 - torch is loaded now, while the hosts load their weights

        self._number, self._name = number or 0, "engine" if number is None else f"engine {number}"
        telemetry.begin(self._name)
        self._options = options
        self._engine: Engine | None = None
        self._engine_server: EngineServer | None = None

    def start(self, copies_LRC: np.ndarray, make_clients: Callable[[], Sequence[HostClient]]) -> dict[str, Any]:
        """Load the backbone, join the hosts, serve; returns {"endpoint", "info", "pid"} when doors may connect.

        `copies_LRC` int16: who holds each unit, its home first. `make_clients` connects to the hosts, or builds one in
        this process.
        """
        from pregate.model.quiet import quiet_transformers
        from pregate.router.engine.build import build_engine
        from pregate.router.link.link import LinkOptions
        from pregate.router.link.server import EngineServer, EngineServerOptions

        quiet_transformers()
        if self._options.pin_cores:
            pin(self._number * self._options.threads, self._options.threads)
        self._engine = engine = build_engine(self._options, make_clients(), copies_LRC)
        if engine.options.device == "cpu":
            collapse_later()
        link = LinkOptions(max_pending_bytes=self._options.max_queued_bytes)
        self._engine_server = EngineServer(engine, self._endpoint, options=EngineServerOptions(link))
        self.serve(self._engine_server, self._name)
        return {"endpoint": self._endpoint, "info": engine.info(), "pid": os.getpid()}

    def replace_host(self, host: int, make_client: Callable[[], HostClient]) -> None:
        """Let another process be a host, or the next one; it serves as soon as it answers. `make_client` connects."""
        self._call(lambda engine: engine.replace_host(host, make_client()))

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        """Let so many hosts serve these units from the next step on; those beyond are left."""
        self._call(lambda engine: engine.place(copies_LRC, num_hosts))

    def lost_hosts(self) -> list[str]:
        """Why each host does not serve; "" where it does."""
        return self._call(lambda engine: [host["lost"] for host in engine.info()["hosts"]])

    def unit_rows(self) -> np.ndarray:
        """How many rows each unit was asked for so far, int64 [L, R]."""
        return self._call(lambda engine: engine.exchange.rows_LR.copy())

    def _call(self, function: Callable[[Engine], Any]) -> Any:
        """Have the thread that owns the engine do something between two steps, and wait for it."""
        assert self._engine is not None and self._engine_server is not None, "start comes first"
        engine = self._engine
        return self._engine_server.call(lambda: function(engine)).result(CALL_TIMEOUT_S)

    def stop(self) -> None:
        """As of `LoopActor`; and leave the hosts."""
        super().stop()
        if self.status()["running"]:  # it may be using the clients' sockets; the process is about to be ended
            return
        if self._engine is not None:
            for client in self._engine.exchange.clients:
                client.close()
        self._engine = None
