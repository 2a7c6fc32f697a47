"""A socket that says what it is told to, and the messages that tests of the channel begin with."""

import time

import zmq

from pregate.workers.link.protocol import (
    GroupKey,
    GroupMessage,
    Heartbeat,
    Hello,
    Rows,
)
from pregate.workers.link.wire import decode

KEY = GroupKey("e", 5, 0, 0)
WIDTH = 512
HELLO = Hello("e", "echo", "float32", 4, 64)
GROUP = GroupMessage(KEY, Rows("float32", (1, 4), bytes(16)), None)


class RawPeer:
    """A socket that says anything; by default as the control socket of a client."""

    def __init__(self, endpoint: str, kind: int = zmq.DEALER, routing_id: bytes = b"craw") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        if kind == zmq.DEALER:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
            self.socket.connect(endpoint)
        else:
            self.socket.bind(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.context.term()

    def ask(self, frames):
        """Send, and return the first answer that is not a heartbeat."""
        self.socket.send_multipart(frames)
        while isinstance(answer := decode(self.socket.recv_multipart()), Heartbeat):
            pass
        return answer


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.01)
