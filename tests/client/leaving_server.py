"""A server that answers a request UNAVAILABLE, or none, while it goes away, and a client that asks it.

    python tests/client/leaving_server.py generate|route

Prints the error's class and the seconds until it came.
"""

import sys
import threading
import time
from concurrent import futures
from typing import Any

import grpc

from pregate import Client
from pregate.base.errors import PregateError
from pregate.client.proto import pregate_pb2_grpc


class Leaving(pregate_pb2_grpc.PregateServicer):
    """Answers as a door does that is drained for too long."""

    def __init__(self, leave: Any) -> None:
        self._leave = leave

    def Generate(self, request, context):  # noqa: N802
        self._go(context)
        yield

    def Route(self, request, context):  # noqa: N802
        self._go(context)

    def _go(self, context: Any) -> None:
        time.sleep(0.5)
        threading.Thread(target=self._leave).start()
        context.abort(grpc.StatusCode.UNAVAILABLE, "the front door is closing")


def main() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pregate_pb2_grpc.add_PregateServicer_to_server(Leaving(lambda: server.stop(0)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client, start_s = Client(f"127.0.0.1:{port}", timeout_s=10, retry_s=0), time.monotonic()
    try:
        client.complete("x", 3) if sys.argv[1] == "generate" else client.route("x")
    except PregateError as error:
        print(type(error).__name__, time.monotonic() - start_s)


if __name__ == "__main__":
    main()
