"""How messages between front doors and engines travel: versioned, size-limited msgpack, never pickle.

One packet is `{"version": 8, "messages": [{"kind": "tokens", ...fields}, ...]}`: everything a step produced for one
peer travels in one packet. Unknown kinds, unknown or missing fields and wrong types are ProtocolErrors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgpack

from pregate.base.completion import TokenLogprob
from pregate.base.errors import ProtocolError
from pregate.model.packed_paths import PackedPaths
from pregate.router.link.messages import (
    CancelRequest,
    FailedEvent,
    FinishedEvent,
    Heartbeat,
    InfoReply,
    InfoRequest,
    KeepAlive,
    Message,
    PackedState,
    RouteReply,
    RouteRequest,
    SamplingParams,
    SubmitRequest,
    TokensEvent,
)

PROTOCOL_VERSION = 8
#: A packet above this is refused on both sides; a million token ids need about 5 MB, and paths of 32k tokens through 32
#: layers of 8 experts 8 MB, or 42 MB with weights.
MAX_PACKET_BYTES = 64 << 20

_KINDS: Mapping[str, type] = MappingProxyType(
    {
        "submit": SubmitRequest,
        "cancel": CancelRequest,
        "route": RouteRequest,
        "info": InfoRequest,
        "keep_alive": KeepAlive,
        "heartbeat": Heartbeat,
        "tokens": TokensEvent,
        "finished": FinishedEvent,
        "failed": FailedEvent,
        "route_reply": RouteReply,
        "info_reply": InfoReply,
    }
)
_NAMES: Mapping[type, str] = MappingProxyType({cls: kind for kind, cls in _KINDS.items()})


def pack(messages: Sequence[Message]) -> bytes:
    """Return one packet. Raises ProtocolError when it would exceed MAX_PACKET_BYTES."""
    body = [{"kind": _NAMES[type(m)], **vars(m)} for m in messages]
    packet = bytes(msgpack.packb({"version": PROTOCOL_VERSION, "messages": body}, default=_plain) or b"")
    _check_size(packet)
    return packet


def _plain(value: Any) -> Any:
    return value.to_frames() if isinstance(value, PackedPaths) else vars(value)


def unpack(packet: bytes) -> list[Message]:
    """Return the messages of a packet. Raises ProtocolError naming what is wrong with it."""
    _check_size(packet)
    try:
        outer = msgpack.unpackb(packet)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"packet of {len(packet)} bytes is not msgpack: {error}") from error
    if not isinstance(outer, dict) or outer.get("version") != PROTOCOL_VERSION:
        version = outer.get("version") if isinstance(outer, dict) else None
        raise ProtocolError(f"packet of protocol version {version!r:.100}; this side speaks {PROTOCOL_VERSION}")
    body = outer.get("messages")
    if not isinstance(body, list):
        raise ProtocolError("packet holds no list of messages")
    return [_read_message(fields) for fields in body]


def _check_size(packet: bytes) -> None:
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolError(f"packet of {len(packet)} bytes; at most {MAX_PACKET_BYTES} are allowed")


def _read_message(fields: object) -> Message:
    kind = fields.pop("kind", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ProtocolError(f"message of unknown kind {kind!r:.100}")
    return _read_fields(_KINDS[kind], fields, kind)


def _read_fields(cls: type, fields: object, where: str) -> Any:
    expected = _types(cls)
    if not isinstance(fields, dict) or fields.keys() != expected.keys():
        raise ProtocolError(f"{where}: fields must be {', '.join(expected)}")
    for name, kind in expected.items():
        try:
            fields[name] = _READERS[kind](fields[name])
        except TypeError as error:
            given = type(fields[name]).__name__
            raise ProtocolError(f"{where}.{name}: {given} where {kind} is expected") from error
    return cls(**fields)


@functools.cache
def _types(cls: type) -> Mapping[str, str]:
    """The type of each field as it is written in the class: annotations are postponed."""
    return MappingProxyType({spec.name: str(spec.type) for spec in dataclasses.fields(cls)})


def _only(*kinds: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in kinds:
            raise TypeError
        return value

    return read


def _many(kind: type, length: int | None = None) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not list or any(type(item) is not kind for item in value):
            raise TypeError
        if length is not None and len(value) != length:
            raise TypeError
        return tuple(value)

    return read


def _read_pairs(value: Any) -> tuple[tuple[int, float], ...]:
    if type(value) is not list:
        raise TypeError
    for pair in value:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) not in (float, int):
            raise TypeError
    return tuple((number, amount) for number, amount in value)


def _read_logprobs(value: Any) -> tuple[TokenLogprob, ...]:
    if type(value) is not list:
        raise TypeError
    return tuple(_read_fields(TokenLogprob, fields, "logprob") for fields in value)


def _read_paths(value: Any) -> PackedPaths:
    return PackedPaths.from_frames(_many(bytes)(value))


_READERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "str": _only(str),
        "str | None": _only(str, type(None)),
        "int": _only(int),
        "int | None": _only(int, type(None)),
        "float": _only(float, int),
        "float | None": _only(float, int, type(None)),
        "bool": _only(bool),
        "bytes": _only(bytes),
        "dict[str, Any]": _only(dict),
        "tuple[int, ...]": _many(int),
        "tuple[int, int, int]": _many(int, 3),
        "tuple[str, ...]": _many(str),
        "tuple[tuple[int, float], ...]": _read_pairs,
        "tuple[TokenLogprob, ...]": _read_logprobs,
        "PackedPaths": _read_paths,
        "PackedPaths | None": lambda value: None if value is None else _read_paths(value),
        "PackedState | None": lambda value: None if value is None else _read_fields(PackedState, value, "path state"),
        "SamplingParams": lambda value: _read_fields(SamplingParams, value, "sampling"),
    }
)
