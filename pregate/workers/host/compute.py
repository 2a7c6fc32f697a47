"""The one thread of a host that computes. It owns the data socket: a group costs no hand-over between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import zmq

from pregate.base.errors import PregateError, ProtocolError
from pregate.base.log import get_logger
from pregate.workers.host.contract import Host
from pregate.workers.host.plan_shelf import NeedPlanError
from pregate.workers.link import transport
from pregate.workers.link.protocol import (
    DATA_LOSS,
    ExpectedMessage,
    Failure,
    GroupKey,
    GroupMessage,
    Heartbeat,
    Message,
    NeedHello,
    NeedPlan,
    PlanMessage,
    RowsMessage,
)
from pregate.workers.link.rows import from_rows, to_rows
from pregate.workers.link.wire import decode, encode

#: Longest sleep on the socket before the thread looks whether it should end.
_WAIT_S = 0.1

_log = get_logger(__name__)


class ComputeThread:
    """Takes plans and groups, of each engine in the order they come and of the engines in turn; asks the host, answers.

    `clients` maps the ids of clients past their handshake to their engines; the I/O thread keeps it, this one reads it.
    """

    def __init__(self, host: Host, socket: zmq.Socket, clients: Mapping[bytes, str]) -> None:
        self._host = host
        self._socket = socket
        self._socket.setsockopt(zmq.RCVTIMEO, int(_WAIT_S * 1000))
        self._clients = clients
        self._stopping = threading.Event()
        self._busy: tuple[Message | None, float] = (None, 0.0)
        self._progress = 0
        #: Seconds in which messages were handled, so far.
        self.compute_s = 0.0
        self._quiet = False
        self._heard: set[bytes] = set()
        self._thread = threading.Thread(target=self._run, name="pregate-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end after the message it is at; True if it has ended within `timeout_s`."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def quiet(self) -> bool:
        """True while nothing is being done and nothing has come for `_WAIT_S`."""
        return self._quiet

    def take_heard(self) -> set[bytes]:
        """Return the clients that have sent something since this was last asked; called from the I/O thread."""
        heard, self._heard = self._heard, set()
        return heard

    def heartbeat(self) -> Heartbeat:
        """Return what the thread has finished and what it is at; called from the I/O thread."""
        message, since_s = self._busy
        busy = ("", 0.0) if message is None else (describe(message), time.monotonic() - since_s)
        host = self._host
        held = host.held_units(), int(host.steady)
        return Heartbeat(host.incarnation, self._progress, *busy, host.cache_counters(), *held)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                peer, *frames = transport.receive(self._socket, look_first=not self._quiet)
            except zmq.Again:
                self._quiet = True
                continue
            self._quiet = False
            answer = self._handle(peer.bytes, frames)
            if answer is not None:
                transport.send(self._socket, peer.bytes, encode(answer))
            self._progress += 1
            self.compute_s += time.monotonic() - self._busy[1] if self._busy[0] else 0.0
            self._busy = (None, 0.0)
        self._socket.close()

    def _handle(self, peer: bytes, frames: Sequence[zmq.Frame]) -> Message | None:
        """Return the answer to a message, None where it has none."""
        key: GroupKey | None = None
        incarnation = self._host.incarnation
        try:
            message = decode([frame.buffer for frame in frames])
        except ProtocolError as error:
            _log.warning("host %d could not read a message: %s", self._host.options.host_id, error)
            return Failure(None, incarnation, DATA_LOSS, str(error))
        try:
            key = message.key if isinstance(message, GroupMessage) else None
            self._busy = (message, time.monotonic())
            return self._ask(peer, message)
        except NeedPlanError:
            assert key is not None
            return NeedPlan(key, incarnation)
        except PregateError as error:
            _log.info("host %d refused a message: %s", self._host.options.host_id, error)
            return Failure(key, incarnation, error.code, str(error))
        except Exception as error:  # noqa: BLE001 (it is logged and answered)
            # A defect of ours in one group must not end the thread that serves all engines.
            _log.exception("host %d failed at %s", self._host.options.host_id, key)
            return Failure(key, incarnation, "INTERNAL", f"{type(error).__name__}: {error}")

    def _ask(self, peer: bytes, message: Message) -> Message | None:
        if transport.client_of(peer) not in self._clients:
            key = message.key if isinstance(message, GroupMessage) else None
            return NeedHello(key, self._host.incarnation)
        self._heard.add(transport.client_of(peer))
        if isinstance(message, GroupMessage):
            rows_PD = self._host.compute(message.key, from_rows(message.rows), message.index)
            return RowsMessage(message.key, self._host.incarnation, to_rows(rows_PD))
        if isinstance(message, PlanMessage):
            self._host.put_plan(message.engine, message.plan)
        elif isinstance(message, ExpectedMessage):
            self._host.expect(message.engine, message.expected)
        else:
            raise ProtocolError(f"the data socket takes no {type(message).__name__}")
        return None


def describe(message: Message) -> str:
    """Say in a few words what handling this message is."""
    if isinstance(message, GroupMessage):
        return f"step {message.key.step} layer {message.key.layer}, {message.rows.shape[0]} rows"
    if isinstance(message, PlanMessage):
        return f"plan of step {message.plan.step}"
    return type(message).__name__
