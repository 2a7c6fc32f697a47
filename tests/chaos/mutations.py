"""Messages that are nearly right: values of other kinds and sizes in valid ones, and bytes turned, cut and doubled."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import xxhash

#: What stands at the edges of types, and what is of another one.
EDGES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 255, 65536, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**64 - 1,
    0.0, -0.0, 1.5, -1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"),
    "", "x", "\x00", "none", "ü" * 9, "a" * 5000, b"", b"\x00" * 7, b"\xff" * 64,
    [], [[]], [None], [1, 2, 3], [0] * 1000, [-1], ["a", 1], {}, {"a": 1}, {"kind": "submit"}, [[[[[[]]]]]],
)  # fmt: skip


def mutate_value(value: Any, rng: random.Random, edges: Sequence[Any] = EDGES) -> Any:
    """A copy with one thing in it changed, somewhere at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, changed = rng.choice(list(value)), dict(value)
        kind = rng.random()
        if kind < 0.07:
            del changed[key]
        elif kind < 0.14:
            changed[rng.choice(["", "extra", "kind", "request_id"])] = rng.choice(edges)
        else:
            changed[key] = mutate_value(value[key], rng, edges)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        place, kind = rng.randrange(len(value)), rng.random()
        new = [mutate_value(value[place], rng, edges)]
        if kind < 0.2:
            new = [] if kind < 0.1 else [value[place]] * rng.choice([2, 50])
        return value[:place] + new + value[place + 1 :]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice([-1, 1, -value - 1, 1 << 31, 1 << 62])
    return rng.choice(edges)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with bits turned, a piece cut out, doubled, or made of chance."""
    if not data:
        return rng.randbytes(rng.randrange(16))
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0:
        turned = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            turned[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(turned)
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:end] + data[at:]
    if kind == 3:
        return data[:at]
    return data[:at] + rng.randbytes(rng.randrange(32)) + data[at:]


def mutate_packet(packet: bytes, rng: random.Random) -> bytes:
    """Of a msgpack packet, by value or by byte."""
    if rng.random() < 0.3:
        return mutate_bytes(packet, rng)
    return _packed(mutate_value(msgpack.unpackb(packet), rng)) or packet


def mutate_frames(frames: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """Of a message of the expert channel, whose checksum fits again in most cases."""
    changed, kind = list(frames), rng.random()
    if kind < 0.1:
        at = rng.randrange(len(changed))
        changed[at] = mutate_bytes(changed[at], rng)
        return changed
    header = frames[0][16:]
    if kind < 0.8 or len(changed) == 1:
        header = _packed(mutate_value(msgpack.unpackb(header), rng)) or header
    elif kind < 0.9:
        at = rng.randrange(1, len(changed))
        changed[at] = mutate_bytes(changed[at], rng)
    else:
        changed = rng.choice([changed[:-1], [*changed, changed[-1]], [changed[0], *changed[:0:-1]]])
    digest = xxhash.xxh3_64_intdigest(header)
    for frame in changed[1:]:
        digest = xxhash.xxh3_64_intdigest(frame, digest)
    changed[0] = struct.pack("<4sIQ", frames[0][:4], struct.unpack_from("<I", frames[0], 4)[0], digest) + header
    return changed


def mutate_proto(message: Any, rng: random.Random) -> bytes:
    """Of a protobuf message, a field at its edge or the bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(message.SerializeToString(), rng)
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.randint(1, 3)):
        _set_some_field(copy, rng)
    return copy.SerializeToString()


def _set_some_field(message: Any, rng: random.Random) -> None:
    if not message.DESCRIPTOR.fields:
        return
    field = rng.choice(list(message.DESCRIPTOR.fields))
    ignored = (TypeError, ValueError, AttributeError, OverflowError)
    if field.message_type is not None and not field.is_repeated:
        _set_some_field(getattr(message, field.name), rng)
        return
    for _ in range(8):  # until one of a fitting kind is found
        value = rng.choice(EDGES)
        try:
            if field.is_repeated and field.message_type is None:
                getattr(message, field.name).extend([value] * rng.choice([1, 3, 300]))
            elif field.is_repeated:
                found = getattr(message, field.name)
                if hasattr(found, "add"):
                    _set_some_field(found.add(), rng)
                else:
                    found[rng.choice([0, 1, 600, 2**32 - 1])] = value
            else:
                setattr(message, field.name, value)
        except ignored:
            continue
        return


def _packed(value: Any) -> bytes | None:
    """None for what msgpack cannot say."""
    try:
        return msgpack.packb(value)
    except (OverflowError, ValueError, TypeError):
        return None
