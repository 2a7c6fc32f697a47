"""Packets between front doors and engines: what goes in comes out, and nothing else comes in."""

import msgpack
import numpy as np
import pytest

from pregate.base.completion import TokenLogprob
from pregate.base.errors import ProtocolError
from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.link.messages import (
    CancelRequest,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    KeepAlive,
    PackedState,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)
from pregate.router.link.packet import MAX_PACKET_BYTES, PROTOCOL_VERSION, pack, unpack

SAMPLING = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, seed=(1 << 63) - 1, stop_token_ids=(2, 5))
LOGPROBS = (TokenLogprob(3, -0.5), TokenLogprob(4, -1.5, ((7, -0.25), (4, -1.5))))
MESSAGES = [
    SubmitRequest("a", (1, 2, 70000), SAMPLING, 1.5),
    SubmitRequest("b", (), SamplingParams(max_tokens=1)),
    CancelRequest("a"),
    RouteRequest("r", (4,)),
    RouteRequest("r", (4,), 2.5, True),
    InfoRequest("i"),
    KeepAlive("door", ("a", "b")),
    Heartbeat("engine", 7, "a step", 12.5, "host 1 is lost"),
    TokensEvent("a", (3, 4)),
    TokensEvent("a", (3, 4), LOGPROBS, LOGPROBS[:1]),
    SubmitRequest("c", (1,), SamplingParams(1, logit_bias=((5, -1.5),), stop=("x",), logprobs=2), priority=-3),
    FinishedEvent("a", "stop", 3, 2, (10, 0), 5, 1, 0.25),
    FailedEvent("b", "UNAVAILABLE", "wört"),
    InfoReply("i", {"model": "m", "eos_token_ids": [2], "nested": {"x": 1.5, "y": None}}),
]


FRAMES = PackedPaths.of(Paths(np.zeros((1, 1, 1), np.int16))).to_frames()
REPLY = {"request_id": "a", "paths": FRAMES, "state": None, "version": ""}
NONE = {"logprobs": [], "prompt_logprobs": []}
SUBMIT = {"request_id": "a", "token_ids": [], "sampling": vars(SAMPLING), "deadline_s": None, "cache_salt": ""}
SUBMIT |= {"paths": None, "path_state": None, "priority": 0, "num_generated": 0, "called": "", "traceparent": ""}


def packet(*messages, version=PROTOCOL_VERSION):
    return msgpack.packb({"version": version, "messages": list(messages)})


def test_every_kind_survives_the_way():
    assert unpack(pack(MESSAGES)) == MESSAGES


def test_paths_and_state_survive_the_way():
    paths = PackedPaths.of(Paths(np.array([[[0, 3], [2, -1]]], np.int16)), 9)
    state = PackedState(bytes(16), (1, 2, 1))
    request = SubmitRequest("a", (1,), SAMPLING, paths=paths, path_state=state)
    reply = RouteReply("r", paths, None, "v")
    for message in unpack(pack([request, reply])):
        assert isinstance(message, (SubmitRequest, RouteReply)) and message.paths is not None
        assert message.paths.slice(0, 1).ids.tolist() == [[[0, 3], [2, -1]]]
        assert isinstance(message, RouteReply) or message.path_state == state


def test_a_step_for_one_peer_is_one_small_packet():
    events = [TokensEvent(f"{i:032x}", (4095,)) for i in range(64)]
    assert len(pack(events)) < 64 * 100


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (pack(MESSAGES)[:-1], "not msgpack"),
        (pack(MESSAGES) + b"\x00", "not msgpack"),
        (b"\x91" * 100_000, "not msgpack"),
        (msgpack.packb([1]), "version None; this side speaks 8"),
        (packet(version=1), "version 1; this side speaks 8"),
        (msgpack.packb({"version": PROTOCOL_VERSION, "messages": "x"}), "no list"),
        (packet("tokens"), "unknown kind None"),
        (packet({"kind": "exec", "request_id": "a"}), "unknown kind 'exec'"),
        (packet({"kind": ["tokens"]}), "unknown kind"),
        (packet({"kind": "cancel"}), "cancel: fields must be request_id"),
        (packet({"kind": "cancel", "request_id": "a", "more": 1}), "cancel: fields must be request_id"),
        (packet({"kind": "cancel", "request_id": 1}), "cancel.request_id: int where str is expected"),
        (packet({"kind": "tokens", "request_id": "a", "token_ids": [1, True], **NONE}), "tokens.token_ids: list where"),
        (packet({"kind": "tokens", "request_id": "a", "token_ids": 3, **NONE}), "tokens.token_ids: int where"),
        (packet({"kind": "submit", **SUBMIT, "sampling": {}}), "sampling: fields must be max_tokens"),
        (packet({"kind": "route_reply", **REPLY, "paths": ["x"]}), "route_reply.paths: list where"),
        (packet({"kind": "route_reply", **REPLY, "paths": [b""] * 4}), "header of another size"),
        (
            packet({"kind": "route_reply", **REPLY, "state": {"data": b"", "shape": [1, 1, 1], "counts": []}}),
            "0 bytes does not hold",
        ),
        (
            packet({"kind": "route_reply", **REPLY, "state": {"data": b"", "shape": [-1, 0, 1], "counts": []}}),
            "does not hold",
        ),
        (
            packet({"kind": "submit", **SUBMIT, "path_state": {"data": b"", "shape": [0, 1, 1], "counts": []}}),
            "or neither",
        ),
    ],
)
def test_anything_else_is_refused_by_name(data, says):
    with pytest.raises(ProtocolError, match=says):
        unpack(data)


def test_size_is_bounded_on_both_sides():
    with pytest.raises(ProtocolError, match=f"at most {MAX_PACKET_BYTES}"):
        pack([FailedEvent("a", "INTERNAL", "x" * MAX_PACKET_BYTES)])
    with pytest.raises(ProtocolError, match=f"at most {MAX_PACKET_BYTES}"):
        unpack(b"x" * (MAX_PACKET_BYTES + 1))
