"""The Ray shell of a host: start, status, drain, stop. Whoever makes the actor wraps the class with `ray.remote`.

That process does not load torch: what computes is imported by `start`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pregate.base.cores import pin
from pregate.base.errors import UnavailableError, UserError
from pregate.base.huge_pages import collapse_later
from pregate.base.telemetry import PLAIN, Telemetry, flush
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress

if TYPE_CHECKING:
    from pregate.workers.host.host import ExpertHost
    from pregate.workers.host.server import HostServer

TRANSPORTS = ("ipc", "tcp", "nearest")


@dataclass(frozen=True)
class ActorOptions:
    """What a host that is an actor is.

    `units` are (layer, expert) of the folder `checkpoint`, or of an adapter's with the dense model `parent`.
    `ipc_folder` (mode 700, made if missing) is needed by transport ipc; tcp listens on `bind_address` (None: this
    node's address in Ray), and off loopback only with `allowed_client_keys`. The nearest of them is ipc on Ray's node
    `engine_node`, without keys, and tcp on others. `num_threads` are torch's; they keep to as many cores from
    `first_core` on.
    """

    checkpoint: str
    parent: str | None = None
    host: HostOptions = field(default_factory=HostOptions)
    units: tuple[tuple[int, int], ...] = ()
    transport: str = "ipc"
    ipc_folder: str | None = None
    engine_node: str = ""
    bind_address: str | None = None
    allowed_client_keys: tuple[str, ...] = ()
    heartbeat_s: float = 0.5
    num_threads: int = 1
    first_core: int | None = None
    telemetry: Telemetry = PLAIN

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise UserError.of("transport", self.transport, f"allowed: {', '.join(TRANSPORTS)}")
        if self.transport != "tcp" and self.ipc_folder is None:
            raise UserError.of("ipc_folder", None, f"transport {self.transport} needs a folder for its socket")
        if self.num_threads < 1:
            raise UserError.of("num_threads", self.num_threads, "must be 1 or more")


class ExpertHostActor:
    """Holds a host and its server in this process. No logic of its own."""

    def __init__(self, options: ActorOptions) -> None:
        self._options = options
        self._host: ExpertHost | None = None
        self._holding = threading.Lock()
        self._server: HostServer | None = None
        self._address: HostAddress | None = None

    def start(self) -> HostAddress:
        """Read the units, listen, and say where. Repeating it returns the same address."""
        if self._address is not None:
            return self._address
        import torch

        from pregate.workers.host.server import HostServer, ServerOptions

        options = self._options = self._nearest(self._options)
        options.telemetry.begin(f"host {options.host.host_id}")
        torch.set_num_threads(options.num_threads)
        if options.first_core is not None:
            pin(options.first_core, options.num_threads)
        host = self._make_host()
        host.warm_up()
        if options.host.device == "cpu":
            collapse_later()
        endpoint = self._endpoint(host)
        server = HostServer(host, ServerOptions(endpoint, options.allowed_client_keys, options.heartbeat_s))
        server.start()
        self._host, self._server = host, server
        self._address = HostAddress(
            options.host.host_id,
            server.endpoint,
            host.incarnation,
            os.getpid(),
            self._node_ip(),
            server.public_key,
        )
        return self._address

    def status(self) -> dict[str, Any]:
        """Return the host's counters and facts; UnavailableError before `start` and after `stop`."""
        host, server = self._running()
        own = {"endpoint": server.endpoint, "num_clients": server.num_clients, "running": server.is_alive}
        return {**host.status(), **own, "compute_s": server.compute_s}

    def hold(self, units: Sequence[tuple[int, int]]) -> None:
        """Be home to these units from now on, and to no others; returns when all are read, serving meanwhile."""
        with self._holding:
            self._running()[0].hold(units)

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Refuse new engines and finish what has been asked for; False if `timeout_s` passes first."""
        return self._running()[1].drain(timeout_s)

    def stop(self) -> None:
        """Close the socket, end the threads, remove the ipc file. Repeating it is harmless."""
        if self._server is not None:
            self._server.stop()
        if self._host is not None:
            self._host.close()
        self._server = self._host = self._address = None
        flush()

    def _running(self) -> tuple[ExpertHost, HostServer]:
        if self._host is None or self._server is None:
            raise UnavailableError(f"expert host {self._options.host.host_id} is not running")
        return self._host, self._server

    def _nearest(self, options: ActorOptions) -> ActorOptions:
        """Choose between ipc and tcp now: who made this actor may not have known where Ray would start it."""
        if options.transport != "nearest":
            return options
        import ray

        beside = ray.get_runtime_context().get_node_id() == options.engine_node
        transport, keys = ("ipc", ()) if beside else ("tcp", options.allowed_client_keys)
        return replace(options, transport=transport, allowed_client_keys=keys)

    def _make_host(self) -> ExpertHost:
        from pregate.model.checkpoint import CheckpointReader
        from pregate.model.read_check import Hashes
        from pregate.workers.host.host import ExpertHost

        reader = CheckpointReader(self._options.checkpoint, self._options.parent, hashes=Hashes.WHILE_READ)
        return ExpertHost(reader, self._options.units, self._options.host)

    def _endpoint(self, host: ExpertHost) -> str:
        if self._options.transport == "ipc":
            # The incarnation is in the name: a restarted host never listens where its forerunner did.
            return f"ipc://{self._options.ipc_folder}/host-{host.options.host_id}-{host.incarnation[:8]}.sock"
        return f"tcp://{self._options.bind_address or self._node_ip()}:*"

    def _node_ip(self) -> str:
        if self._options.bind_address is not None:
            return self._options.bind_address
        import ray

        return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
