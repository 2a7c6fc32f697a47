from dataclasses import replace

import msgpack
import numpy as np
import pytest

from pregate.base.errors import ProtocolError
from pregate.workers.link import wire
from pregate.workers.link.protocol import (
    KINDS,
    PROTOCOL_VERSION,
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
    HostPlan,
    NeedHello,
    NeedPlan,
    PlanMessage,
    Refused,
    Rows,
    RowsMessage,
)
from pregate.workers.link.wire import decode, encode

KEY = GroupKey("e1", 12, 3, 1, 2)
ROWS = Rows("float32", (2, 3), np.arange(6, dtype=np.float32).tobytes())


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


MESSAGES = [
    Hello("e1", "f" * 64, "float32", 3, 256),
    HelloAck(4, "h1", 77, 256, 12, 0.5, "ipc:///x"),
    Refused("h1", "no"),
    Bye("e1"),
    PlanMessage("e1", HostPlan(12, i32(3, 0), i32(0, 2, 2), i32(1, 4), i32(2, 2), i32(0, 4, 4), i32(0, 2, 0, 1))),
    ExpectedMessage("e1", Expected(13, np.eye(15, dtype=bool).reshape(9, 5, 5), np.full((5, 5), 7, dtype=np.uint8))),
    GroupMessage(KEY, ROWS, GroupIndex(i32(1, 4), i32(1, 2), i32(0, 0, 1))),
    GroupMessage(KEY, ROWS, None),
    RowsMessage(KEY, "h1", ROWS),
    NeedHello(KEY, "h1"),
    NeedHello(None, "h1"),
    NeedPlan(KEY, "h1"),
    Failure(KEY, "h1", "INTERNAL", "broken"),
    Failure(None, "h1", "INTERNAL", "broken"),
    Heartbeat("h1", 9, "step 1", 0.25, CacheCounters(5, 1, 6, 70, 3, 2, 4096, 4096, 2048, 0, 0.5)),
    Heartbeat("h1", 9, "", 0.0, CacheCounters(), np.eye(3, 5, dtype=bool)),
]


def plain(value):
    """A message as nested lists, for comparison."""
    if isinstance(value, np.ndarray):
        assert value.dtype in (np.int32, np.uint8, bool)
        return value.tolist()
    if isinstance(value, Rows):
        return [value.dtype, value.shape, bytes(value.data)]
    if hasattr(value, "__dataclass_fields__"):
        return [type(value).__name__, *(plain(getattr(value, name)) for name in value.__dataclass_fields__)]
    return value


def seal(header: dict, *frames: bytes, magic: bytes = b"pgw\0", version: int = PROTOCOL_VERSION) -> list[bytes]:
    """Frames with a right checksum around any header."""
    packed = msgpack.packb(header)
    assert packed is not None
    return [wire._PREFIX.pack(magic, version, wire._checksum(packed, frames)) + packed, *frames]


def test_every_kind_of_message_is_tested():
    assert {type(m) for m in MESSAGES} == set(KINDS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message):
    frames = [memoryview(bytes(f)) for f in encode(message)]
    assert plain(decode(frames)) == plain(message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_any_changed_byte_is_noticed(message):
    frames = [bytes(f) for f in encode(message)]
    for number, frame in enumerate(frames):
        for position in range(0, len(frame), 7):
            damaged = bytearray(frame)
            damaged[position] ^= 0x10
            with pytest.raises(ProtocolError):
                decode([*frames[:number], bytes(damaged), *frames[number + 1 :]])


def test_swapped_and_missing_frames_are_noticed():
    frames = [bytes(f) for f in encode(next(m for m in MESSAGES if isinstance(m, GroupMessage)))]
    for wrong in (frames[:-1], [*frames, b""], [frames[0], *frames[:0:-1]], frames[1:], []):
        with pytest.raises(ProtocolError):
            decode(wrong)


def test_another_version_is_named_before_anything_else_is_read():
    with pytest.raises(ProtocolError, match=f"protocol version 9; this side speaks {PROTOCOL_VERSION}"):
        decode(seal({"kind": "something new"}, version=9))
    with pytest.raises(ProtocolError, match="not of pregate"):
        decode(seal({"kind": "bye"}, magic=b"HTTP"))


def test_size_limits():
    frames = encode(GroupMessage(KEY, Rows("float32", (1, 1000), bytes(4000)), None))
    decode(frames, max_bytes=5000)
    with pytest.raises(ProtocolError, match="allowed: 4000"):
        decode(frames, max_bytes=4000)
    with pytest.raises(ProtocolError, match="header"):
        decode(encode(Refused("h1", "x" * (1 << 17))))


@pytest.mark.parametrize(
    ("header", "frames"),
    [
        ({}, ()),
        ({"kind": "shutdown"}, ()),
        ({"kind": ["bye"]}, ()),
        ({"kind": "bye"}, ()),
        ({"kind": "bye", "engine": 3}, ()),
        ({"kind": "bye", "engine": "e", "more": 1}, ()),
        ({"kind": "heartbeat", "incarnation": "h", "progress": True, "busy_with": "", "busy_since_s": 0.0}, ()),
        ({"kind": "need_plan", "key": ["e", 1, 2, 3], "incarnation": "h"}, ()),
        ({"kind": "need_plan", "key": ["e", 1, 2, 3, 0.5], "incarnation": "h"}, ()),
        ({"kind": "rows", "key": list(KEY), "incarnation": "h", "rows": ["float32", 1, 2]}, (b"1234",)),
        ({"kind": "rows", "key": list(KEY), "incarnation": "h", "rows": ["float32", 1, 2]}, ()),
        ({"kind": "rows", "key": list(KEY), "incarnation": "h", "rows": ["object", 1, 1]}, (b"12345678",)),
        ({"kind": "rows", "key": list(KEY), "incarnation": "h", "rows": ["float32", -1, -1]}, (b"1234",)),
        ({"kind": "group", "key": list(KEY), "rows": ["float32", 1, 1], "index": [1, 1]}, (b"1234", b"1234", b"1234")),
        ({"kind": "group", "key": list(KEY), "rows": ["float32", 1, 1], "index": [1, 1, -1]}, (b"1234",) * 3),
    ],
)
def test_malformed_headers_are_refused(header, frames):
    with pytest.raises(ProtocolError):
        decode(seal(header, *frames))


def test_a_step_beyond_what_can_be_counted_in_layers_is_refused():
    """Found by 100,000 messages of nonsense: 64 bits did not hold it, and the host took it for a defect of its own."""
    expected = Expected(1 << 48, np.ones((1, 2, 3), dtype=bool), np.zeros((2, 3), dtype=np.uint8))
    with pytest.raises(ProtocolError, match="does not describe expected units"):
        decode(encode(ExpectedMessage("e1", expected)))
    last = replace(expected, step=(1 << 48) - 1)
    assert plain(decode(encode(ExpectedMessage("e1", last)))) == plain(ExpectedMessage("e1", last))


def test_what_is_not_msgpack_is_refused():
    for packed in (b"\xc1", b"", b"\x93\x01", b"\x01"):
        with pytest.raises(ProtocolError):
            decode([wire._PREFIX.pack(b"pgw\0", PROTOCOL_VERSION, wire._checksum(packed, [])) + packed])
