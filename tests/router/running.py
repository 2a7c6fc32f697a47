"""Helpers of the front-door tests: an engine thread and a door's event loop around a real engine."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import zmq

from pregate.client.client import Client
from pregate.client.proto import pregate_pb2_grpc as pb_grpc
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.service import DoorService, ServiceOptions
from pregate.router.engine.engine import Engine
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.link import LinkOptions
from pregate.router.link.messages import Message
from pregate.router.link.packet import pack, unpack
from pregate.router.link.server import EngineServer, EngineServerOptions
from tests.router.serving import engine_over, expert_hosts

_T = TypeVar("_T")

#: A prompt of any of the tests' checkpoints, and an engine's server that soon loses patience.
PROMPT = (1, 5, 6, 7)
QUICK = EngineServerOptions(LinkOptions(heartbeat_s=0.05), host_patience_s=0.5)


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "the condition") -> float:
    """Return the seconds until `condition` held; AssertionError after `timeout_s`."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, f"{what} did not come within {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - start_s


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder with a short name: Unix sockets allow about 100 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="door-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def engine_thread(
    engine: Engine, endpoint: str, options: EngineServerOptions | None = None, context: zmq.Context | None = None
) -> Iterator[threading.Event]:
    """Run the engine's server; yields the event that stops it."""
    stop = threading.Event()
    server = EngineServer(engine, endpoint, options=options, context=context)
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def slow_steps(engine: Engine, seconds_s: float) -> None:
    """The same steps, each a little later, so that a test can act in between."""
    step = engine.step

    def later():
        time.sleep(seconds_s)
        return step()

    engine.step = later


class LoopThread:
    """An event loop in a thread, as a door process has."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class RawDoor:
    """Speaks packets, and only when asked to."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(endpoint)
        self._arrived: list[Message] = []

    def send(self, *messages: Message) -> None:
        self.socket.send(pack(messages))

    def receive(self, kind: type[_T], timeout_s: float = 20.0) -> _T:
        """Return the next message of this kind, passing over others; AssertionError when none comes."""
        message = self.look(kind, timeout_s)
        assert message is not None, f"no {kind.__name__} within {timeout_s} s"
        return message

    def look(self, kind: type[_T], timeout_s: float) -> _T | None:
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            for message in self._arrived:
                if isinstance(message, kind):
                    del self._arrived[: self._arrived.index(message) + 1]
                    return message
            self._arrived.clear()
            if self.socket.poll(50):
                self._arrived.extend(unpack(self.socket.recv()))
        return None

    def close(self) -> None:
        self.socket.close(linger=0)

    def __enter__(self) -> RawDoor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Door:
    """A gRPC front door that listens, and ways to reach it."""

    loop: LoopThread
    service: DoorService
    server: GrpcServer
    target: str
    client: Client
    stub: pb_grpc.PregateStub

    def stop(self, grace_s: float = 5.0) -> None:
        self.loop.call(self.server.stop(grace_s))


@contextmanager
def door(
    endpoint: str,
    tokenizer_dir: Path,
    *,
    name: str = "tiny",
    grpc_options: GrpcOptions | None = None,
    client_options: EngineClientOptions | None = None,
    service_options: ServiceOptions | None = None,
    context: zmq.Context | None = None,
    engine_first: bool = False,
) -> Iterator[Door]:
    """A gRPC front door of the engine at `endpoint`; `engine_first`: it has answered before, as in a deployment."""
    loop = LoopThread()
    engine_client = EngineClient(endpoint, options=client_options, context=context)
    service = DoorService(engine_client, tokenizer_dir, name, options=service_options)
    server = GrpcServer(service, grpc_options or GrpcOptions(port=0))
    try:
        if engine_first:
            loop.call(service.model_info())
        target = f"127.0.0.1:{loop.call(server.start())}"
        with Client(target, timeout_s=60, retry_s=0) as client, grpc.insecure_channel(target) as channel:
            yield Door(loop, service, server, target, client, pb_grpc.PregateStub(channel))
    finally:
        loop.call(server.stop(1))
        loop.close()


@contextmanager
def local_engine(checkpoint: Path, num_hosts: int = 0, **options: Any) -> Iterator[Engine]:
    """An engine in this process, over host processes or over one host in this process."""
    with ExitStack() as stack:
        addresses = []
        if num_hosts:
            folder = stack.enter_context(socket_folder())
            addresses = stack.enter_context(expert_hosts(checkpoint, num_hosts, folder))
        yield stack.enter_context(engine_over(checkpoint, addresses, **options))


@contextmanager
def served(checkpoint: Path, num_hosts: int = 0, **options: Any) -> Iterator[tuple[Engine, Door]]:
    """The whole way: expert hosts, engine, door."""
    with local_engine(checkpoint, num_hosts, **options) as engine, socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        with engine_thread(engine, endpoint), door(endpoint, checkpoint, engine_first=True) as front:
            wait_for(front.client.health, what="health")
            yield engine, front
