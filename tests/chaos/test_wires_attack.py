"""Nonsense on the wires behind the doors: nothing ends, hangs, leaks or grows.

A small part of each by default; with PREGATE_CHAOS_KILLS set 1,000 clients, 1,000 cancels and 100,000 messages a wire.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from pregate.base.completion import TokenLogprob
from pregate.base.errors import ProtocolError
from pregate.router.link import messages as link
from pregate.router.link.packet import pack, unpack
from pregate.workers.link import protocol as channel
from pregate.workers.link import transport
from pregate.workers.link.wire import decode, encode
from tests.chaos.attacked import NUM_MESSAGES, Target, under_attack
from tests.chaos.mutations import mutate_frames, mutate_packet

SAMPLING = link.SamplingParams(2, 0.5, 0.9, 7, (3,), logit_bias=((5, 1.0),), logprobs=1, stop=("x",))
TO_ENGINE: Sequence[link.Message] = (
    link.SubmitRequest("a", (1, 40, 41), SAMPLING, 20.0, "salt"),
    link.SubmitRequest("b", (1, 40, 41), link.SamplingParams(3), num_generated=1),
    link.CancelRequest("a"),
    link.RouteRequest("c", (1, 40, 41), 20.0, True),
    link.InfoRequest("d"),
    link.KeepAlive("door", ("a", "b")),
)
TO_DOOR: Sequence[link.Message] = (
    link.Heartbeat("e", 3, "a step", 0.1, None),
    link.TokensEvent("a", (5, 6), (TokenLogprob(5, -0.5, ((6, -1.0),)),)),
    link.FinishedEvent("a", "stop", 3, 2, (4, 5), 1, 2, 0.5),
    link.FailedEvent("a", "UNAVAILABLE", "no"),
    link.InfoReply("d", {"vocab_size": 512, "hosts": []}),
)


@pytest.mark.parametrize("wire", ["engine", "paths"])
def test_nonsense_on_the_link(target, wire):
    """To the engine, and to the path service, which speaks the same."""
    rng = random.Random(3)
    with under_attack(target, f"{NUM_MESSAGES} messages to the {wire}"), zmq_context() as context:
        socket = context.socket(zmq.DEALER)
        socket.connect(target.where[wire])
        for number in range(NUM_MESSAGES):
            given = [rng.choice(TO_ENGINE) for _ in range(rng.choice([1, 1, 1, 3]))]
            packet = mutate_packet(pack(given), rng)
            assert socket.poll(60_000, zmq.POLLOUT), "it reads no more"
            socket.send_multipart([packet] if rng.random() < 0.98 else [packet, b"", packet])
            if number % 100 == 99:
                ask(socket, target, f"q{number}")
        ask(socket, target, "the last")


def ask(socket: zmq.Socket, target: Target, name: str) -> None:
    """Wait until everything sent before has been read: until a valid question is answered."""
    socket.send(pack([link.InfoRequest(name)]))
    while True:
        assert socket.poll(60_000), f"no answer to {name}"
        for message in unpack(socket.recv()):
            target.told[type(message).__name__] += 1
            if isinstance(message, link.InfoReply) and message.request_id == name:
                return


def to_host(engine: str, fingerprint: str, width: int) -> list[channel.Message]:
    key = channel.GroupKey(engine, 1, 0, 0)
    index = channel.GroupIndex(*(np.array(a, np.int32) for a in ([1, 4], [2, 2], [0, 2, 0, 1])))
    rows = channel.Rows("float32", (3, width), b"\0" * (12 * width))
    lists = ([3, 3, 0], [0, 2, 4, 4], [1, 4, 1, 4], [2, 2, 2, 2], [0, 4, 8, 8], [0, 2, 0, 1, 0, 2, 0, 1])
    arrays: list[Any] = [np.array(a, np.int32) for a in lists]
    plan = channel.HostPlan(1, *arrays)
    expected = channel.Expected(2, np.ones((2, 3, 6), bool), np.zeros((3, 6), bool))
    return [
        channel.Hello(engine, fingerprint, "float32", width, 64),
        channel.Bye(engine),
        channel.PlanMessage(engine, plan),
        channel.ExpectedMessage(engine, expected),
        channel.GroupMessage(key, rows, None),
        channel.GroupMessage(key, rows, index),
    ]


def test_nonsense_to_an_expert_host(target):
    """On both of its sockets, by an engine that it has greeted; it greets it anew, and serves the real one."""
    rng, given = random.Random(4), to_host("attacker", target.where["fingerprint"], 64)
    frames = [[bytes(frame) for frame in encode(message)] for message in given]
    with under_attack(target, f"{NUM_MESSAGES} messages to a host"), zmq_context() as context:
        sockets = []
        for name, wire in ((transport.control_id(b"attacker"), "host"), (transport.data_id(b"attacker"), "data")):
            sockets.append(context.socket(zmq.DEALER))
            sockets[-1].setsockopt(zmq.ROUTING_ID, name)
            sockets[-1].connect(target.where[wire])
        greet(sockets, given, 0, target)
        for number in range(NUM_MESSAGES):
            socket = sockets[rng.random() < 0.8]
            assert socket.poll(60_000, zmq.POLLOUT), "it reads no more"
            socket.send_multipart(mutate_frames(rng.choice(frames), rng))
            if number % 100 == 99:
                greet(sockets, given, number, target)


def greet(sockets: Sequence[zmq.Socket], given: Sequence[Any], number: int, target: Target) -> None:
    """A valid greeting is answered, and then a valid group, after all that came before; each is known by a number."""
    control, data = sockets
    hello = replace(given[0], max_rows=4 + number // 100 % 60)
    control.send_multipart(encode(hello))
    until(control, lambda m: isinstance(m, channel.HelloAck) and m.max_rows == hello.max_rows, target)
    group = replace(given[-1], key=given[-1].key._replace(step=1 << 40 | number))
    data.send_multipart(encode(group))
    until(data, lambda m: isinstance(m, channel.RowsMessage) and m.key == group.key, target)


def until(socket: zmq.Socket, wanted: Callable[[Any], bool], target: Target) -> None:
    give_up_s = time.monotonic() + 60
    while True:
        assert time.monotonic() < give_up_s and socket.poll(60_000), "no answer"
        message = decode(socket.recv_multipart())
        target.told[type(message).__name__] += 1
        if wanted(message):
            return


@contextmanager
def zmq_context() -> Iterator[zmq.Context]:
    """Whose end waits for nobody."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def test_nonsense_is_a_protocol_error_on_either_side():
    """What doors, engine and hosts read, of every kind: nothing else is ever raised."""
    rng, told = random.Random(5), Counter()
    index = channel.RowsMessage(channel.GroupKey("e", 1, 0, 0), "i", channel.Rows("float32", (2, 2), b"\0" * 16))
    beat = channel.Heartbeat("i", 3, "x", 0.5, channel.CacheCounters(1, 2, 3))
    others = [index, beat, channel.NeedPlan(index.key, "i"), channel.Failure(None, "i", "INTERNAL", "x")]
    frames = [[bytes(f) for f in encode(message)] for message in (*to_host("e", "f", 4), *others)]
    for _ in range(NUM_MESSAGES):
        attempts: list[tuple[Callable[[Any], object], object]] = [
            (unpack, mutate_packet(pack([rng.choice((*TO_ENGINE, *TO_DOOR))]), rng)),
            (decode, mutate_frames(rng.choice(frames), rng)),
        ]
        for read, data in attempts:
            try:
                read(data)
                told["read"] += 1
            except ProtocolError:
                told["refused"] += 1
    print(dict(told))
    assert min(told.values()) > NUM_MESSAGES // 100
