"""`Connection`: the two sockets of a client to its host, and whether they are connected, as ZeroMQ itself says."""

from __future__ import annotations

import time
import uuid

import zmq
from zmq.utils.monitor import recv_monitor_message

from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.link import transport
from pregate.workers.link.protocol import HostAddress

#: Longest sleep while waiting for an answer, before the heartbeats' age is looked at again.
_WAIT_SLICE_S = 0.2


class _Watched:
    """A socket that connects to one peer. `up`: it is connected, and both have said who they are."""

    def __init__(self, socket: zmq.Socket) -> None:
        self.socket, self.up = socket, False
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def look(self) -> bool:
        """Read what has happened, without waiting; True where it was cut, having been up."""
        cut = False
        while self._monitor.poll(0):
            up = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            cut, self.up = cut or (self.up and not up), up
        return cut

    def close(self, linger_ms: int | None) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(linger_ms)


class Connection:
    """`control` is there from the start, `data` once the host has said where it listens for it.

    A process that dies closes its sockets at once. One that is stopped, or a way on which nothing comes through, is
    found by ZeroMQ's own heartbeats. `renew` makes both anew under another name: what was on its way is lost, and
    whatever is wrong with the old ones (half open, bytes that are not where they belong) ends with them.
    """

    def __init__(self, context: zmq.Context, address: HostAddress, options: ChannelOptions) -> None:
        self._context, self._address, self._options = context, address, options
        self._cut_s: float | None = None
        self._open_control()

    def _open_control(self) -> None:
        # Named by us, so that the host knows us again after a broken connection.
        self._id = uuid.uuid4().bytes
        self._renewed_s = time.monotonic()
        self._data: _Watched | None = None
        beat_s = self._options.host_timeout_s / 4
        self._control = self._open(self._address.endpoint, transport.control_id(self._id), beat_s, 2 * beat_s)

    def open_data(self, endpoint: str) -> None:
        """Connect the data socket, in place of the one there was."""
        if self._data is not None:
            self._data.close(0)
        self._opened_s = time.monotonic()
        self._data = self._open(endpoint, transport.data_id(self._id), transport.PING_S, transport.PONG_S)

    def _open(self, endpoint: str, routing_id: bytes, ping_s: float, pong_s: float) -> _Watched:
        socket = transport.open_socket(self._context, zmq.DEALER, ping_s, pong_s)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        # A receive with a timeout costs less than a poll and a receive.
        slice_s = min(_WAIT_SLICE_S, self._options.host_timeout_s / 4)
        socket.setsockopt(zmq.RCVTIMEO, max(1, int(slice_s * 1000)))
        if self._address.server_public_key is not None and self._options.keys is not None:
            socket.curve_serverkey = self._address.server_public_key.encode()
            socket.curve_publickey = self._options.keys.public.encode()
            socket.curve_secretkey = self._options.keys.secret.encode()
        watched = _Watched(socket)
        socket.connect(endpoint)
        return watched

    @property
    def control(self) -> zmq.Socket:
        return self._control.socket

    @property
    def data(self) -> zmq.Socket | None:
        return None if self._data is None else self._data.socket

    @property
    def up(self) -> bool:
        """Whether both are connected, as far as was looked."""
        return self._control.up and self._data is not None and self._data.up

    @property
    def cut_s(self) -> float:
        """For how long it has not been up since it was cut."""
        return 0.0 if self._cut_s is None else time.monotonic() - self._cut_s

    @property
    def waits_s(self) -> float:
        """For how long it has not been up since it was made anew."""
        return 0.0 if self.up else time.monotonic() - self._renewed_s

    @property
    def opening_s(self) -> float:
        """For how long the data socket has been waiting for its first connection."""
        return 0.0 if self._data is None or self._data.up else time.monotonic() - self._opened_s

    def look(self) -> bool:
        """Read what has happened, without waiting; True where either was cut."""
        cut = self._control.look()
        if self._data is not None:
            cut |= self._data.look()
        if cut and self._cut_s is None:
            self._cut_s = time.monotonic()
        elif self.up:
            self._cut_s = None
        return cut

    def renew(self) -> None:
        """Close both at once and connect the control socket anew."""
        self.close(0)
        self._open_control()

    def close(self, linger_ms: int | None = None) -> None:
        for watched in (self._control, self._data):
            if watched is not None:
                watched.close(linger_ms)
