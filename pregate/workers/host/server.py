"""`HostServer`: a host's channel, two sockets with a thread each.

    control   I/O thread       hello, heartbeats, goodbye; answers whatever the other thread is at
    data      compute thread   plans and groups in, rows out

Handing a group from one thread to another and back costs more than the protocol itself (measured: 15 to 40
microseconds of about 150), so the thread that computes reads and writes the rows itself.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq
import zmq.auth.thread

from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.workers.host.compute import ComputeThread
from pregate.workers.host.contract import Host
from pregate.workers.host.control import ControlThread
from pregate.workers.link import transport
from pregate.workers.link.transport import CurveKeys

_log = get_logger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """`endpoint` ipc://PATH or tcp://ADDRESS:PORT (`*`: any port); the data socket listens beside it, on ipc at PATH.d,
    on tcp at any port. With `allowed_client_keys` (Z85) both speak CURVE and take these clients only."""

    endpoint: str
    allowed_client_keys: tuple[str, ...] = ()
    heartbeat_s: float = 0.5

    def __post_init__(self) -> None:
        transport.check_endpoint(self.endpoint, self.allowed_client_keys)
        if self.heartbeat_s <= 0:
            raise UserError.of("server options", asdict(self), "heartbeat_s must be above 0")


class HostServer:
    """Serves one host to any number of engines.

    `start` returns when both sockets listen; `endpoint` then names the real port. `stop` ends both threads and removes
    the ipc files.
    """

    def __init__(self, host: Host, options: ServerOptions) -> None:
        self._host = host
        self._options = options
        self._keys = CurveKeys.new() if options.allowed_client_keys else None
        self._clients: dict[bytes, str] = {}
        self._context = zmq.Context()
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self.endpoint = options.endpoint
        self.data_endpoint = ""

    @property
    def public_key(self) -> str | None:
        """The server's CURVE key that clients must know; None where the sockets are not encrypted."""
        return self._keys.public if self._keys else None

    @property
    def is_alive(self) -> bool:
        """Whether both threads run: a defect of ours may have ended one."""
        return self._compute.is_alive and self._control.is_alive

    @property
    def compute_s(self) -> float:
        """For how long groups and plans were computed so far."""
        return self._compute.compute_s

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def start(self) -> None:
        """Listen and start both threads. Raises UserError when the endpoint cannot be had."""
        if self._keys is not None:
            # The library's authenticator has a thread; it wakes for handshakes only.
            self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", transport.AllowedKeys(self._options.allowed_client_keys))
        control, self.endpoint = self._bind(self._options.endpoint)
        data, self.data_endpoint = self._bind(transport.data_endpoint(self._options.endpoint))
        self._compute = ComputeThread(self._host, data, self._clients)
        heartbeat_s = self._options.heartbeat_s
        self._control = ControlThread(self._host, control, self._compute, self._clients, heartbeat_s=heartbeat_s)
        self._control.data_endpoint = self.data_endpoint
        self._compute.start()
        self._control.start()
        _log.info("host %d listens on %s", self._host.options.host_id, self.endpoint)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new engines and wait until nothing is left to compute; False if `timeout_s` passes first."""
        self._control.draining.set()
        deadline_s = time.monotonic() + timeout_s
        while not self._compute.quiet:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.01)
        return True

    def stop(self, timeout_s: float = 5.0) -> None:
        """End both threads (a running computation has `timeout_s`), close the sockets, remove the ipc files."""
        ended = self._compute.stop(timeout_s)
        self._control.stop(timeout_s)
        if ended:
            self._close()
        else:
            _log.warning("host %d: the compute thread is still busy at stop", self._host.options.host_id)
        for endpoint in (self.endpoint, self.data_endpoint):
            if endpoint.startswith("ipc://"):
                Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy()

    def _bind(self, endpoint: str) -> tuple[zmq.Socket, str]:
        """Return a listening socket and where it listens."""
        socket = transport.open_socket(self._context, zmq.ROUTER)
        # A peer that is gone is an error to notice, not a silent drop; a peer that reconnects takes its place again.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self._keys is not None:
            socket.curve_server = True
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        try:
            if endpoint.startswith("ipc://"):
                transport.private_folder(Path(endpoint.removeprefix("ipc://")).parent)
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._close()
            raise UserError.of("endpoint", endpoint, f"cannot listen there ({error})") from error
        except UserError:
            self._close()
            raise
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)
