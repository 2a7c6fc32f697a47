"""A proxy before an expert host, or an engine: what passes is cut, held up, swallowed or damaged."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

UP, DOWN = "up", "down"


@dataclass(frozen=True)
class Fault:
    """What happens to bytes on their way up (to the host) and down. `cut`: nobody is connected any more. `swallow`: the
    ways on which nothing comes through, not even that the other end has gone, on all connections or on those `only_old`
    that there are already. `damage` is done to a `share` of all pieces, up to 64 KB each. `unsteady_s`: new connections
    are silent for up to so long, so that later ones overtake them, and one piece in ten is the last of its connection;
    on connections that there are already the next one is.
    """

    cut: bool = False
    delay_s: float = 0.0
    swallow: frozenset[str] = frozenset()
    only_old: bool = False
    damage: Callable[[bytes, random.Random], bytes] | None = None
    share: float = 0.1
    unsteady_s: float = 0.0


NONE = Fault()


def doubled(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data + data, data[:end] + data[at:]])


def shortened(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:at] + data[end:]


def flipped(data: bytes, rng: random.Random) -> bytes:
    turned = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        turned[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(turned)


class _Pair(NamedTuple):
    """A connection: the engine's end, and that to the host."""

    near: socket.socket
    far: socket.socket
    born_s: float


class Proxy:
    """Stands where a host's ipc sockets are looked for, and they have moved aside; where one socket is all there is,
    `parts` is that. `fault` holds from now on."""

    def __init__(self, endpoint: str, parts: tuple[str, ...] = ("", ".d")) -> None:
        self._fault, self._since_s, self._closed = NONE, 0.0, False
        self._rng, self._pairs, self._listeners = random.Random(5), set(), []
        self._gone: list[_Pair] = []
        self.num_damaged = 0
        for path in (Path(endpoint.removeprefix("ipc://") + part) for part in parts):
            aside = path.with_name(path.name + "-")
            path.rename(aside)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen(64)
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, str(aside)), daemon=True).start()

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._fault, self._since_s = fault, time.monotonic()
        while self._gone:  # nobody is to learn of it before; kept for ever they would use up all files
            self._cut(self._gone.pop())
        if fault.cut:
            self._cut_all()

    def _cut_all(self) -> None:
        for pair in list(self._pairs):
            self._cut(pair)

    def _cut(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        for end in pair[:2]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket, aside: str) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._connect, args=(near, aside), daemon=True).start()

    def _connect(self, near: socket.socket, aside: str) -> None:
        time.sleep(self._rng.random() * self._fault.unsteady_s)
        pair = _Pair(near, socket.socket(socket.AF_UNIX), time.monotonic())
        self._pairs.add(pair)
        try:
            pair.far.connect(aside)
        except OSError:
            self._cut(pair)
            return
        if self._fault.cut or self._closed:
            self._cut(pair)
        for way in (UP, DOWN):
            threading.Thread(target=self._pump, args=(pair, way), daemon=True).start()

    def _pump(self, pair: _Pair, way: str) -> None:
        source, sink = (pair.near, pair.far) if way == UP else (pair.far, pair.near)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self._fault.delay_s)
                if not self._swallows(pair, way):
                    sink.sendall(self._damaged(data))
                if self._fault.unsteady_s and (pair.born_s < self._since_s or self._rng.random() < 0.1):
                    break
        if not self._swallows(pair, way):
            self._cut(pair)
        else:
            self._gone.append(pair)

    def _swallows(self, pair: _Pair, way: str) -> bool:
        return way in self._fault.swallow and (not self._fault.only_old or pair.born_s < self._since_s)

    def _damaged(self, data: bytes) -> bytes:
        if self._fault.damage is None or self._rng.random() >= self._fault.share:
            return data
        self.num_damaged += 1
        return self._fault.damage(data, self._rng)

    def close(self) -> None:
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._cut_all()
