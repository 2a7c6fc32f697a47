"""Messages as frames and back.

Frame 0 is a 16-byte prefix (magic, version, xxh3-64 of all that follows, little endian) and a msgpack map of the
fields; each array or block of rows is one further raw frame, its dtype and shape in the map. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import msgpack
import numpy as np
import xxhash

from pregate.base.errors import ProtocolError
from pregate.workers.link.protocol import (
    DTYPE_BYTES,
    KINDS,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Buffer,
    CacheCounters,
    Expected,
    GroupIndex,
    GroupKey,
    HostPlan,
    Message,
    Rows,
)

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"pgw\0"
#: No array may have a longer side, not one without elements either.
_MOST_ROWS = 1 << 31
Reader: TypeAlias = Callable[[str, Any, Iterator[Buffer]], Any]


def _pack(value: Any, frames: list[Buffer]) -> Any:
    """Return what stands in the map for `value`, appending its raw frames."""
    if isinstance(value, Rows):
        frames.append(value.data)
        return [value.dtype, *value.shape]
    if value is None or isinstance(value, (str, int, float, GroupKey)):
        return value
    if isinstance(value, Expected):
        frames += [np.packbits(value.known_HLR).data, np.ascontiguousarray(value.likely_LR).data.cast("B")]
        return [value.step, *value.known_HLR.shape]
    if isinstance(value, (GroupIndex, HostPlan, CacheCounters)):
        return [_pack(getattr(value, f.name), frames) for f in dataclasses.fields(value)]
    if value.dtype == bool:
        frames.append(np.packbits(value).data)
        return list(value.shape)
    frames.append(np.ascontiguousarray(value, dtype="<i4").data.cast("B"))
    return value.shape[0]


def _checksum(header: Buffer, frames: Sequence[Buffer]) -> int:
    """Hash of the header, then of each frame seeded with the hash before it: order and borders count."""
    digest = xxhash.xxh3_64_intdigest(header)
    for frame in frames:
        digest = xxhash.xxh3_64_intdigest(frame, digest)
    return digest


def encode(message: Message) -> list[Buffer]:
    """Return the frames of a message. Raw frames refer to its arrays; send them before these change."""
    frames: list[Buffer] = []
    fields = {"kind": KINDS[type(message)]}
    for name, _ in _SCHEMA[fields["kind"]][1]:
        fields[name] = _pack(getattr(message, name), frames)
    header = bytes(msgpack.packb(fields) or b"")
    return [_PREFIX.pack(_MAGIC, PROTOCOL_VERSION, _checksum(header, frames)) + header, *frames]


def decode(frames: Sequence[Buffer], max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Rebuild a message from flat byte buffers; its arrays and rows refer to them.

    Raises ProtocolError for another version, a size above `max_bytes`, a checksum that does not match, and any
    field that is missing, unknown or of a wrong type.
    """
    fields = _open(frames, max_bytes)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _SCHEMA:
        raise ProtocolError(f"message kind {kind!r:.100}: unknown")
    cls, schema = _SCHEMA[kind]
    if len(fields) != len(schema) or any(name not in fields for name, _ in schema):
        raise ProtocolError(
            f"{kind} message: fields {sorted(map(str, fields))!s:.200}, expected {[n for n, _ in schema]}"
        )
    rest = iter(frames[1:])
    try:
        message = cls(*[read(kind, fields[name], rest) for name, read in schema])
    except (ValueError, TypeError, OverflowError) as error:  # NumPy's, of shapes that it cannot make
        raise ProtocolError(f"{kind} message: {error}") from error
    if next(rest, None) is not None:
        raise ProtocolError(f"{kind} message: more frames than its header names")
    return message


def _open(frames: Sequence[Buffer], max_bytes: int) -> dict[str, Any]:
    """Check version, sizes and checksum; return the header's map."""
    if not frames or len(frames[0]) < _PREFIX.size:
        raise ProtocolError("message has no header")
    magic, version, checksum = _PREFIX.unpack_from(frames[0])
    if magic != _MAGIC:
        raise ProtocolError("message is not of pregate's worker protocol")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version}; this side speaks {PROTOCOL_VERSION}")
    total_bytes = sum(map(len, frames))
    if len(frames[0]) > MAX_HEADER_BYTES or total_bytes > max_bytes:
        raise ProtocolError(f"message of {total_bytes} bytes; allowed: {max_bytes}, of them {MAX_HEADER_BYTES} header")
    header = memoryview(frames[0])[_PREFIX.size :]
    if _checksum(header, frames[1:]) != checksum:
        raise ProtocolError("message fails its checksum")
    try:
        fields = msgpack.unpackb(header)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"message header is not msgpack ({error})") from error
    if not isinstance(fields, dict):
        raise ProtocolError("message header is not a map")
    return fields


def _scalar(allowed: type) -> Reader:
    def read(kind: str, value: Any, _: Iterator[Buffer]) -> Any:
        if type(value) is not allowed:
            raise ProtocolError(f"{kind} message: {value!r:.100} is not {allowed.__name__}")
        return value

    return read


def _optional(inner: Reader) -> Reader:
    return lambda kind, value, rest: None if value is None else inner(kind, value, rest)


def _key(kind: str, value: Any, _: Iterator[Buffer]) -> GroupKey:
    if type(value) is list and len(value) == 5:
        engine, step, layer, group, attempt = value
        # Spelled out: this runs for every group, and a generator costs more than all of it.
        if type(engine) is str and type(step) is type(layer) is type(group) is type(attempt) is int:
            return GroupKey(engine, step, layer, group, attempt)
    raise ProtocolError(f"{kind} message: {value!r:.100} is not a group key")


def _frame(kind: str, num_bytes: int, rest: Iterator[Buffer]) -> Buffer:
    frame = next(rest, None)
    if frame is None or len(frame) != num_bytes:
        found = "none" if frame is None else f"{len(frame)} bytes"
        raise ProtocolError(f"{kind} message: a frame of {num_bytes} bytes expected, got {found}")
    return frame


def _rows(kind: str, value: Any, rest: Iterator[Buffer]) -> Rows:
    if type(value) is list and len(value) == 3 and value[0] in DTYPE_BYTES:
        dtype, num_rows, width = value
        if type(num_rows) is type(width) is int and 0 <= num_rows < _MOST_ROWS and 0 <= width < _MOST_ROWS:
            frame = _frame(kind, num_rows * width * DTYPE_BYTES[dtype], rest)
            return Rows(dtype, (num_rows, width), frame)
    raise ProtocolError(f"{kind} message: {value!r:.100} does not describe rows")


def _array(kind: str, value: Any, rest: Iterator[Buffer]) -> np.ndarray:
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{kind} message: {value!r:.100} is not an array length")
    return np.frombuffer(_frame(kind, 4 * value, rest), dtype="<i4")


#: Counts and numbers of steps are below this: times the layers they fit 64 bits.
_MOST = 1 << 48


def _expected(kind: str, value: Any, rest: Iterator[Buffer]) -> Expected:
    """One bit a unit of each step, then a byte a unit."""
    step, horizon, *shape = _counts(kind, value, 4, "expected units")
    known_HLR = _flags(kind, (horizon, *shape), rest)
    likely_LR = np.frombuffer(_frame(kind, math.prod(shape), rest), dtype=np.uint8).reshape(shape)
    return Expected(step, known_HLR, likely_LR)


def _held(kind: str, value: Any, rest: Iterator[Buffer]) -> np.ndarray:
    """One bit a unit of a table [L, R]."""
    return _flags(kind, tuple(_counts(kind, value, 2, "a table of units")), rest)


def _counts(kind: str, value: Any, number: int, what: str) -> list[int]:
    if type(value) is not list or len(value) != number or any(type(n) is not int or not 0 <= n < _MOST for n in value):
        raise ProtocolError(f"{kind} message: {value!r:.100} does not describe {what}")
    return value


def _flags(kind: str, shape: tuple[int, ...], rest: Iterator[Buffer]) -> np.ndarray:
    count = math.prod(shape)
    bits = np.unpackbits(np.frombuffer(_frame(kind, -(-count // 8), rest), dtype=np.uint8), count=count)
    return bits.view(bool).reshape(shape)


def _record(cls: type, *readers: Reader) -> Reader:
    def read(kind: str, value: Any, rest: Iterator[Buffer]) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise ProtocolError(f"{kind} message: {value!r:.100} is not a {cls.__name__}")
        return cls(*[r(kind, v, rest) for r, v in zip(readers, value, strict=True)])

    return read


_INT, _STR, _INDEX = _scalar(int), _scalar(str), _record(GroupIndex, _array, _array, _array)
_NUMBERS: Mapping[str, Reader] = MappingProxyType({"int": _INT, "float": _scalar(float)})
#: How each declared field type is read back; the annotations above are the schema.
_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        **_NUMBERS,
        "str": _STR,
        "GroupKey": _key,
        "GroupKey | None": _optional(_key),
        "Rows": _rows,
        "GroupIndex | None": _optional(_INDEX),
        "CacheCounters": _record(CacheCounters, *[_NUMBERS[str(f.type)] for f in dataclasses.fields(CacheCounters)]),
        "Expected": _expected,
        "np.ndarray | None": _optional(_held),
        "HostPlan": _record(HostPlan, _INT, _array, _array, _array, _array, _array, _array, _STR),
    }
)
_SCHEMA: Mapping[str, tuple[type, tuple[tuple[str, Reader], ...]]] = MappingProxyType(
    {
        kind: (cls, tuple((f.name, _READERS[str(f.type)]) for f in dataclasses.fields(cls)))
        for cls, kind in KINDS.items()
    }
)
