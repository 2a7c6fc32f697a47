"""`ChannelClient`: an engine's end of a host behind ZeroMQ sockets, one for control and one for data.

It starts no Python thread: the engine's one thread sends, waits and polls. Shape letters: N rows of a group,
P (row, expert) pairs, D hidden width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import zmq

from pregate.base.errors import BY_CODE, HostLostError, PregateError, ProtocolError, UserError
from pregate.base.log import get_logger
from pregate.workers.client.channel_options import ChannelOptions, ChannelStats
from pregate.workers.client.connection import Connection
from pregate.workers.client.flights import Flight, Flights
from pregate.workers.client.sent_plans import SentPlans
from pregate.workers.client.silence import Silence
from pregate.workers.link import transport
from pregate.workers.link.protocol import (
    DATA_LOSS,
    Buffer,
    Bye,
    CacheCounters,
    Expected,
    ExpectedMessage,
    Failure,
    GroupIndex,
    GroupKey,
    GroupMessage,
    Heartbeat,
    Hello,
    HelloAck,
    HostAddress,
    HostPlan,
    Message,
    NeedHello,
    NeedPlan,
    PlanMessage,
    Refused,
    RowsMessage,
)
from pregate.workers.link.rows import dtype_name, from_rows, to_rows
from pregate.workers.link.wire import decode, encode

if TYPE_CHECKING:
    from pregate.workers.client.local import LocalUnits

#: Heartbeats are taken in at least this often, also while answers come without a pause.
_CONTROL_EVERY_S = 0.5
#: A host that gets on, reading experts for one that is lost say, has its time again and again, so often at most.
_MAX_TIMEOUTS = 4
#: Messages in a row that cannot be read, ours or the host's, before it counts as lost: one may be damaged on its way.
_MAX_DAMAGED = 3

_log = get_logger(__name__)


class ChannelClient:
    """A host behind its sockets. `context` may be shared by all clients of an engine.

    Where a connection is cut, or nothing comes through, or what comes is damaged, or the host does not know us any
    more, both sockets are made anew, the host is greeted, and what has no answer is sent again. A host that was silent
    for too long is greeted until it answers; then it serves again. Another incarnation in its place is taken where it
    holds as many units, under the same terms.
    """

    def __init__(
        self, address: HostAddress, options: ChannelOptions | None = None, context: zmq.Context | None = None
    ) -> None:
        self._options = options or ChannelOptions()
        if address.server_public_key is not None and self._options.keys is None:
            raise UserError.of("endpoint", address.endpoint, "is encrypted; needs a client key pair")
        self.host_id, self.node = address.host_id, address.node_ip
        self.stats = ChannelStats()
        self.last_heartbeat: Heartbeat | None = None
        self._address = address
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._incarnation = address.incarnation
        self._engine = ""
        self._dtype: torch.dtype | None = None
        self._hello: Hello | None = None
        self._greeting: HelloAck | Refused | None = None
        self._terms: HelloAck | None = None
        self._plans = SentPlans()
        self._flights = Flights()
        self._greeted_s, self._greet_every_s = 0.0, self._options.host_timeout_s / 6
        self._round_trip_s = 0.0
        self._fenced, self._num_damaged = False, 0
        self._fenced_beat: Heartbeat | None = None
        self._silence = Silence(self._options.host_timeout_s / 3)
        self._looked_at_control_s = time.monotonic()
        self._connection = Connection(self._context, address, self._options)

    def hello(self, *, engine: str, fingerprint: str, dtype: torch.dtype, width: int, max_rows: int) -> HelloAck:
        self.fence(Hello(engine, fingerprint, dtype_name(dtype), width, max_rows))
        self._greet()
        deadline_s = time.monotonic() + self._options.hello_timeout_s
        while self._greeting is None or (isinstance(self._greeting, HelloAck) and not self._connection.up):
            if time.monotonic() > deadline_s:
                where = f"{self._options.hello_timeout_s:g} s at {self._address.endpoint}"
                raise HostLostError(self.host_id, f"no answer to hello within {where}")
            if self._greeting is None:
                self._take(self._connection.control, 0)
            else:
                time.sleep(0.001)
            self._look_after_connection()
        if isinstance(self._greeting, Refused):
            raise UserError(f"expert host {self.host_id} refused: {self._greeting.reason}")
        self._fenced = False
        return self._greeting

    def fence(self, hello: Hello | None = None) -> None:
        if hello is not None or self._hello is not None:  # a socket that led to nobody may do so for good; and a
            self._connection.renew()  # connection's time counts from here, not from when this client was made
        if hello is not None:
            self._engine, self._hello, self._terms = hello.engine, hello, None
            self._dtype = getattr(torch, hello.dtype)
        self._flights.abandon()
        self._fenced, self._greeting, self._num_damaged = True, None, 0
        self._fenced_beat = self.last_heartbeat

    def returned(self) -> bool:
        if not self._fenced:
            return True
        try:
            self._look_after_connection()
            self._drain_all()
        except PregateError as error:
            _log.warning("host %d cannot be taken back: %s", self.host_id, error)
            self._greeting = None
        if isinstance(self._greeting, HelloAck) and self._connection.up and not self._is_stuck():
            self._fenced = False
        else:
            with contextlib.suppress(HostLostError):  # as many greetings wait for it as may
                self._greet(self._greet_every_s)
        return not self._fenced

    def _look_after_connection(self) -> None:
        """Of a host that is greeted. ZeroMQ connects a socket no more after an answer that made no sense to it."""
        if self._connection.look() or self._connection.waits_s > self._options.hello_timeout_s:
            self._renew()

    def _is_stuck(self) -> bool:
        """Whether the host's compute thread is still at what it was at when it was given up: its I/O thread answers."""
        then, now = self._fenced_beat, self.last_heartbeat
        if then is None or now is None or not now.busy_with:
            return False
        return (now.incarnation, now.progress) == (then.incarnation, then.progress)

    def _greet(self, pause_s: float = 0.0) -> None:
        """Say hello, unless that was less than `pause_s` ago."""
        if self._hello is not None and time.monotonic() - self._greeted_s >= pause_s:
            self._greeted_s = time.monotonic()
            self._send(self._connection.control, encode(self._hello))

    def _renew(self) -> None:
        """Talk on new sockets: greet, and when the host has answered send again what has no answer."""
        self.stats.renewals += 1
        self._greeting = None  # the answer to come tells where the data socket connects
        self._connection.renew()
        self._greet()

    @property
    def cache(self) -> CacheCounters:
        return CacheCounters() if self.last_heartbeat is None else self.last_heartbeat.cache

    @property
    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        beat = self.last_heartbeat
        return None if beat is None or beat.steady else beat.held_LR

    @property
    def units_LR(self) -> np.ndarray | None:  # noqa: N802
        return None if self.last_heartbeat is None else self.last_heartbeat.held_LR

    def warm_up(self) -> None:
        pass

    def send_plan(self, plan: HostPlan) -> None:
        self._plans.put(plan)
        self.stats.plan_bytes += self._send(self._connection.data, encode(PlanMessage(self._engine, plan)))
        self.stats.plans += 1

    def expect(self, expected: Expected) -> None:
        with contextlib.suppress(HostLostError):  # whoever sends rows next hears of it
            self.stats.plan_bytes += self._send(self._connection.data, encode(ExpectedMessage(self._engine, expected)))

    def send_group(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None = None) -> None:
        hello = self._hello
        if hello is None or rows_ND.dtype != self._dtype or rows_ND.shape[0] > hello.max_rows:
            got, agreed = f"{rows_ND.shape[0]} rows of {rows_ND.dtype}", hello and f"{hello.max_rows} of {self._dtype}"
            raise ProtocolError(f"group of {got}; agreed: at most {agreed}")
        self._drain(self._connection.control)  # heartbeats of the time before say nothing of this group
        self._flights.add(flight := Flight(key, rows_ND, index))
        self._send_flight(flight)
        self.stats.groups += 1

    def receive(self, key: GroupKey, timeout_s: float) -> torch.Tensor:
        flight, began_s, done = self._flights[key], time.monotonic(), self._work_done()
        waited, idle = (Silence(self._options.host_timeout_s / 3) for _ in range(2))
        try:
            while flight.answer is None:
                if done != (done := self._work_done()):
                    idle.end()
                if idle.count() > timeout_s or waited.count() > _MAX_TIMEOUTS * timeout_s:
                    late = f"no answer for step {key.step} layer {key.layer} within {waited.seconds:.0f} s"
                    raise HostLostError(self.host_id, f"{late}; {self._last_words()}")
                self._wait()
        finally:
            self._flights.abandon(key)
            self.stats.wait_s += time.monotonic() - began_s
        if isinstance(flight.answer, Failure):
            raise self._error_of(flight.answer)
        return from_rows(flight.answer.rows)

    def _work_done(self) -> tuple[int, int]:
        """What changes while the host gets on: messages done, bytes of experts read."""
        beat = self.last_heartbeat
        return (0, 0) if beat is None else (beat.progress, beat.cache.read_bytes)

    def abandon(self, key: GroupKey | None = None) -> None:
        self._flights.abandon(key)

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        return "the host is another process"

    def poll(self) -> None:
        if not self._drain_all():
            self._check_alive()

    def close(self) -> None:
        if self._terms is not None:
            with contextlib.suppress(HostLostError):
                self._send(self._connection.control, encode(Bye(self._engine)))
        self._connection.close()
        if self._own_context:
            self._context.term()

    def _send_flight(self, flight: Flight) -> None:
        message = GroupMessage(flight.key, to_rows(flight.rows_ND), flight.index)
        self.stats.group_bytes += self._send(self._connection.data, encode(message))
        self.stats.indexed_groups += flight.index is not None

    def _send(self, socket: zmq.Socket | None, frames: Sequence[Buffer]) -> int:
        """Hand a message to a socket; returns its bytes. Where the host is yet to answer on new sockets it is dropped:
        what has no answer is sent then, and a plan when it is asked for."""
        if socket is None:
            if self._terms is None:
                raise ProtocolError(f"expert host {self.host_id} has not been greeted: say hello first")
            return 0
        try:
            # Copied: pyzmq's zero-copy sends need a Python thread to release each buffer.
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            reason = f"its connection is gone, or {transport.SEND_QUEUE} messages to it are unsent"
            raise HostLostError(self.host_id, reason) from error
        return sum(map(len, frames))

    # --- what arrives

    def _wait(self) -> None:
        """Take one message from the data socket, waiting a slice of time for it; look after the host meanwhile."""
        heard = self._take(self._connection.data or self._connection.control, 0)
        if heard and self._silence.looked_s - self._looked_at_control_s < _CONTROL_EVERY_S:
            return
        if not self._drain(self._connection.control) and not heard:
            self._check_alive()

    def _drain_all(self) -> bool:
        heard = self._drain(self._connection.control)
        data = self._connection.data
        return heard if data is None else self._drain(data) or heard

    def _drain(self, socket: zmq.Socket) -> bool:
        """Take what is there, without waiting; True if anything was."""
        heard = False
        while not socket.closed and self._take(socket, zmq.NOBLOCK):
            heard = True
        if socket is self._connection.control:
            self._looked_at_control_s = time.monotonic()
        return heard

    def _take(self, socket: zmq.Socket, flags: int) -> bool:
        """Handle one message, waiting for it at most a slice of time (`flags` 0) or not at all (NOBLOCK)."""
        try:
            frames = socket.recv_multipart(flags, copy=False) if flags else transport.receive(socket)
        except zmq.Again:
            return False
        self._silence.end()
        try:
            message = decode([f.buffer for f in frames])
        except ProtocolError as error:
            self._damaged(str(error))
        else:
            self._handle(message, sum(map(len, frames)))
        return True

    def _damaged(self, reason: str) -> None:
        """A message could not be read, by us or by the host, and what follows it may be in the wrong place."""
        self._num_damaged += 1
        if self._num_damaged > _MAX_DAMAGED and not self._fenced:
            raise HostLostError(self.host_id, f"{self._num_damaged} messages could not be read: {reason}")
        _log.warning("host %d: a message could not be read: %s", self.host_id, reason)
        self._renew()

    def _check_alive(self) -> None:
        silent_s, patience_s = self._silence.count(), self._options.host_timeout_s
        if self._terms is None:
            return
        if self._connection.look():
            self._renew()
        if self._connection.cut_s > self._options.cut_timeout_s or self._connection.opening_s > patience_s:
            raise HostLostError(self.host_id, f"its connection is cut; {self._last_words()}")
        if silent_s < patience_s / 2:
            return
        self._greet(self._greet_every_s)  # a host that forgot us sends no heartbeats, but answers to this
        if silent_s > patience_s:
            raise HostLostError(self.host_id, f"silent for {silent_s:.1f} s; {self._last_words()}")

    def _handle(self, message: Message, num_bytes: int) -> None:
        if isinstance(message, (Hello, Bye, PlanMessage, ExpectedMessage, GroupMessage)):
            raise ProtocolError(f"a host sent a {type(message).__name__}")
        if isinstance(message, (HelloAck, Refused)):
            self._greeted(message)
        elif message.incarnation != self._incarnation:
            # Another process answers where our host was: its rows are not ours, and it knows nothing of us.
            self.stats.discarded_answers += not isinstance(message, Heartbeat)
            self._greet(self._greet_every_s)
        elif isinstance(message, Heartbeat):
            last, self.last_heartbeat = self.last_heartbeat, message
            idle = not message.busy_with and message.progress == (last and last.progress)
            if self._flights.missed(idle, 2 * self._round_trip_s):
                self._renew()
        elif isinstance(message, NeedHello):
            self._renew()
        else:
            self._answered(message, num_bytes)

    def _greeted(self, answer: HelloAck | Refused) -> None:
        """Take a host's terms, the first time or again. Raises HostLostError where it is not the one it was."""
        terms, self._greeting = self._terms, answer
        replaced = answer.incarnation != self._incarnation
        if isinstance(answer, Refused):
            if terms is not None:
                raise HostLostError(self.host_id, f"it refused to go on: {answer.reason}")
            return
        if replaced and (terms is None or answer.num_units < terms.num_units):
            wanted = "" if terms is None else f" which holds {answer.num_units} units, not {terms.num_units}"
            where = f"{self._address.endpoint} answers with another incarnation{wanted}"
            raise HostLostError(self.host_id, f"it was replaced: {where}")
        self._incarnation, self._terms = answer.incarnation, answer
        self._round_trip_s = time.monotonic() - self._greeted_s
        if replaced or self._connection.data is None:
            self._connection.open_data(answer.data_endpoint)
            for flight in self._flights.unanswered:
                self._send_again(flight)

    def _send_again(self, flight: Flight) -> None:
        flight.key, flight.idle_beats, flight.sent_s = flight.key.next_attempt(), 0, time.monotonic()
        self._send_flight(flight)
        self.stats.resent_groups += 1

    def _answered(self, message: RowsMessage | NeedPlan | Failure, num_bytes: int) -> None:
        if isinstance(message, Failure) and message.key is None:
            if message.code != DATA_LOSS:
                raise self._error_of(message)
            self._damaged(message.text)
            return
        flight = self._flights.waiting_for(message.key)
        if flight is None:
            self.stats.discarded_answers += 1
            _log.info("host %d: discarded a stale answer for %s", self.host_id, message.key)
        elif isinstance(message, NeedPlan):
            self.send_plan(self._plans.get(flight.key.step))
            self._send_again(flight)
        else:
            flight.answer, self._num_damaged = message, 0
            self.stats.reply_bytes += num_bytes

    def _error_of(self, failure: Failure) -> PregateError:
        """Rebuild what the host failed with."""
        return BY_CODE.get(failure.code, PregateError)(f"expert host {self.host_id}: {failure.text}")

    def _last_words(self) -> str:
        return "no heartbeat came" if self.last_heartbeat is None else self.last_heartbeat.describe()
