"""Between the wire's messages and the values of `base/`, for both ends: fields of one name are carried as they are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.client.proto import pregate_pb2 as pb

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")


def to_message(kind: type[_M], source: object, **named: Any) -> _M:
    """A message of what an object, or a mapping, has by the names of its fields; `named` come before these, and None
    leaves a field out."""
    given = source if isinstance(source, Mapping) else vars(source)
    return kind(**{name: given[name] for name in _fields(kind) if name in given and name not in named}, **named)


def from_message(kind: type[_T], message: Message, **named: Any) -> _T:
    """A dataclass of what a message has by the names of its fields, lists as tuples; `named` come before these."""
    shared = [name for name in _attributes(kind) if name in _fields(type(message)) and name not in named]
    return kind(**{name: _plain(getattr(message, name)) for name in shared}, **named)


def given_fields(message: Message) -> dict[str, Any]:
    """What a message says that differs from its fields' defaults, or may, lists as tuples."""
    return {field.name: _plain(value) for field, value in message.ListFields()}


def chunk_message(chunk: Chunk) -> pb.GenerateStreamChunk:
    logprobs = {"output_logprobs": _to_logprobs(chunk.logprobs), "input_logprobs": _to_logprobs(chunk.prompt_logprobs)}
    return to_message(pb.GenerateStreamChunk, chunk, **logprobs)


def complete_message(done: Completion) -> pb.GenerateComplete:
    logprobs = {"output_logprobs": _to_logprobs(done.logprobs), "input_logprobs": _to_logprobs(done.prompt_logprobs)}
    return to_message(pb.GenerateComplete, done, output_ids=done.token_ids, **logprobs)


def read_chunk(message: pb.GenerateStreamChunk) -> Chunk:
    return from_message(Chunk, message, **_logprobs(message))


def read_completion(message: pb.GenerateComplete) -> Completion:
    return from_message(Completion, message, token_ids=tuple(message.output_ids), **_logprobs(message))


@functools.cache
def _fields(kind: type[Message]) -> tuple[str, ...]:
    return tuple(field.name for field in kind.DESCRIPTOR.fields)


@functools.cache
def _attributes(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value


def _to_logprobs(tokens: Sequence[TokenLogprob]) -> pb.LogProbs | None:
    if not tokens:
        return None
    return pb.LogProbs(
        token_logprobs=[t.logprob for t in tokens],
        token_ids=[t.token_id for t in tokens],
        top_logprobs=[pb.TopLogProbs(values=[v for _, v in t.top], token_ids=[i for i, _ in t.top]) for t in tokens],
    )


def _logprobs(message: pb.GenerateStreamChunk | pb.GenerateComplete) -> dict[str, tuple[TokenLogprob, ...]]:
    parts = {"logprobs": message.output_logprobs, "prompt_logprobs": message.input_logprobs}
    return {
        name: tuple(
            TokenLogprob(token_id, value, tuple(zip(top.token_ids, top.values, strict=True)))
            for token_id, value, top in zip(part.token_ids, part.token_logprobs, part.top_logprobs, strict=True)
        )
        for name, part in parts.items()
    }
