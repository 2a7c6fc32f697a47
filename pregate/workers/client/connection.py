"""`Connection`: whether a socket is connected, as ZeroMQ itself says."""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import recv_monitor_message


class Connection:
    """Watches a socket that connects to one peer. A process that dies closes its sockets at once; one that is stopped
    does not."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._cut_s: float | None = None
        self._was_cut = False

    @property
    def cut_s(self) -> float:
        """For how long it has not been connected, having been so before."""
        return 0.0 if self._cut_s is None else time.monotonic() - self._cut_s

    def look(self) -> bool:
        """Read what has happened, without waiting; True where it is connected again."""
        again = False
        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                self._cut_s, self._was_cut, again = self._cut_s or time.monotonic(), True, False
            else:
                again = self._was_cut
                self._cut_s = None
        return again

    def take_cut(self) -> bool:
        """Whether it was cut since this was last asked: what was on its way then may be lost."""
        was_cut, self._was_cut = self._was_cut, False
        return was_cut

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
