"""The I/O thread of a host: handshakes, heartbeats, goodbyes. It answers while the compute thread is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import numpy as np
import zmq

from pregate.base.errors import ProtocolError, UserError
from pregate.base.log import get_logger
from pregate.workers.host.compute import ComputeThread
from pregate.workers.host.contract import Host
from pregate.workers.link import transport
from pregate.workers.link.protocol import DATA_LOSS, Bye, Failure, Hello, HelloAck, Message, Refused
from pregate.workers.link.wire import decode, encode

#: Longest sleep on the socket before the thread looks whether it should end.
_WAIT_S = 0.1
#: And before it looks whether units have come or gone.
_MOVED_S = 0.03

_log = get_logger(__name__)


class ControlThread:
    """Owns the control socket and `clients` (client id -> engine), the clients past their handshake."""

    def __init__(
        self, host: Host, socket: zmq.Socket, compute: ComputeThread, clients: dict[bytes, str], *, heartbeat_s: float
    ) -> None:
        self._host = host
        self._socket = socket
        self._compute = compute
        self._clients = clients
        self._heartbeat_s = heartbeat_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pregate-io", daemon=True)
        #: Set: no new engine is taken.
        self.draining = threading.Event()
        #: Where the data socket listens, for those past their handshake.
        self.data_endpoint = ""
        self._said_LR: np.ndarray | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        next_beat_s, wait_s = time.monotonic(), _WAIT_S if self._host.steady else _MOVED_S
        while not self._stopping.is_set():
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                next_beat_s = now_s + self._heartbeat_s
                self._beat(self._clients)
            elif self._moved() and (heard := self._compute.take_heard()):
                self._beat(heard)
            if self._socket.poll(int(min(next_beat_s - now_s, wait_s) * 1000) + 1):
                self._receive()
        self._socket.close()

    def _moved(self) -> bool:
        """Whether units have come or gone since engines were last told, where they do. Who plans by that plans a step
        in less than the time between heartbeats, so those who have sent something since hear of it at once; others do
        not, for they may not read."""
        held_LR = None if self._host.steady else self._host.held_units()
        return held_LR is not None and (self._said_LR is None or not np.array_equal(self._said_LR, held_LR))

    def _beat(self, clients: Iterable[bytes]) -> None:
        beat = self._compute.heartbeat()
        self._said_LR, frames = beat.held_LR, encode(beat)
        for client in [client for client in tuple(clients) if client in self._clients]:
            if not transport.send(self._socket, transport.control_id(client), frames):
                self._leave(client)

    def _receive(self) -> None:
        peer, *frames = self._socket.recv_multipart(copy=False)
        incarnation = self._host.incarnation
        try:
            message = decode([frame.buffer for frame in frames])
        except ProtocolError as error:
            _log.warning("host %d could not read a message: %s", self._host.options.host_id, error)
            answer = Failure(None, incarnation, DATA_LOSS, str(error))
        else:
            try:
                answer = self._answer(transport.client_of(peer.bytes), message)
            except (ProtocolError, UserError) as error:
                _log.warning("host %d refused a message: %s", self._host.options.host_id, error)
                answer = Failure(None, incarnation, error.code, str(error))
            except Exception as error:  # noqa: BLE001 (it is logged and answered)
                # As in the compute thread: a defect of ours in one message must not end what all engines hear.
                _log.exception("host %d failed at a message", self._host.options.host_id)
                answer = Failure(None, incarnation, "INTERNAL", f"{type(error).__name__}: {error}")
        if answer is not None:
            transport.send(self._socket, peer.bytes, encode(answer))

    def _answer(self, client: bytes, message: Message) -> Message | None:
        if isinstance(message, Hello):
            return self._greet(client, message)
        if isinstance(message, Bye):
            self._leave(client)
            return None
        raise ProtocolError(f"the control socket takes no {type(message).__name__}")

    def _greet(self, client: bytes, hello: Hello) -> HelloAck | Refused:
        host = self._host
        try:
            if self.draining.is_set():
                raise UserError(f"host {host.options.host_id} is draining")
            ack = host.accept(hello, heartbeat_s=self._heartbeat_s, data_endpoint=self.data_endpoint)
        except UserError as error:
            return Refused(host.incarnation, str(error))
        self._clients[client] = hello.engine
        return ack

    def _leave(self, client: bytes) -> None:
        """Forget a client; its engine's plans go when none of the engine's clients is left."""
        engine = self._clients.pop(client, None)
        if engine is not None and engine not in self._clients.values():
            self._host.forget(engine)
