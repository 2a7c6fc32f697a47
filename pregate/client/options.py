"""What a request may say, in Python's words, and the messages that say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pregate.base.errors import UserError
from pregate.base.sampling import check_ids
from pregate.client.proto import pregate_pb2 as pb

_M = TypeVar("_M", bound=Message)
#: What a field of each kind carries, in a user's words.
_ALLOWED: Mapping[int, str] = MappingProxyType(
    {
        FieldDescriptor.CPPTYPE_INT64: f"a whole number, {-(1 << 63)} to {(1 << 63) - 1}",
        FieldDescriptor.CPPTYPE_UINT32: f"a whole number, 0 to {(1 << 32) - 1}",
        FieldDescriptor.CPPTYPE_DOUBLE: "a number",
        FieldDescriptor.CPPTYPE_BOOL: "True or False",
        FieldDescriptor.CPPTYPE_STRING: "text without lone surrogates",
    }
)
#: Text or token ids.
Prompt: TypeAlias = str | Sequence[int]
#: Each with a `role` and a `content`.
Messages: TypeAlias = Sequence[Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """Options of a request; docs/serve.md says in which order they work.

    `temperature` 0 (the default) is greedy. A text ends before the first of its `stop` texts or `stop_token_ids`.
    `logprobs` and `prompt_logprobs` give those of each token and of that many likeliest ones. `n` completions share the
    prompt. Of requests that wait those of the lowest `priority` come first; `timeout_s` is this one's deadline. With
    `stream` False nothing comes before the end. A `request_id` can be aborted by.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    priority: int
    stream: bool
    model: str
    request_id: str
    timeout_s: float | None


def generate_request(given: dict[str, Any], max_tokens: int | None, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message of a request for `given` (of `prompt_field` or `chat_field`). UserError names unknown options."""
    if wrong := {name: value for name, value in options.items() if name not in GenerateOptions.__annotations__}:
        raise UserError.of_unknown(wrong, sorted({"max_tokens", *GenerateOptions.__annotations__}))
    sampling = {name: value for name, value in options.items() if name in pb.SamplingParams.DESCRIPTOR.fields_by_name}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    _check("stop_token_ids", sampling.get("stop_token_ids", ()))
    return build(
        pb.GenerateRequest,
        sampling_params=build(pb.SamplingParams, max_tokens=max_tokens, **sampling),
        stream=options.get("stream", True),
        **{name: options[name] for name in ("request_id", "priority", "model") if name in options},
        **given,
    )


def prompt_field(prompt: Prompt) -> dict[str, Any]:
    """The field of a message that says a prompt."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise UserError.of("prompt", f"of {type(prompt).__name__}", "must be text or a list of token ids")
    _check("prompt token id", prompt)
    return {"tokenized": build(pb.TokenizedInput, input_ids=prompt)}


def chat_field(messages: Messages) -> dict[str, Any]:
    """The field of a message that says a chat."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError.of("messages", ascii(messages)[:80], "must be a list of mappings with role and content")
    return {"chat": pb.ChatInput(messages=[build(pb.ChatMessage, **message) for message in messages])}


def build(kind: type[_M], **fields: Any) -> _M:
    """A message; UserError for a value that its field cannot carry, by the field's name."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:  # protobuf's words say neither which field nor what it takes
        for name, value in fields.items():
            _check_carried(kind, name, value)
        raise UserError(f"{kind.__name__}: {error}") from None


def _check_carried(kind: type[Message], name: str, value: Any) -> None:
    field = kind.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        raise UserError.of_unknown({name: value}, kind.DESCRIPTOR.fields_by_name)
    try:
        kind(**{name: value})
    except (ValueError, TypeError):
        raise UserError.of(name, ascii(value)[:80], f"must be {_allowed(field)}") from None


def _allowed(field: Any) -> str:
    if field.message_type is None:
        return _ALLOWED[field.cpp_type] if not field.is_repeated else f"a list, each {_ALLOWED[field.cpp_type]}"
    if field.message_type.GetOptions().map_entry:
        key, value = (_ALLOWED[field.message_type.fields_by_name[end].cpp_type] for end in ("key", "value"))
        return f"a mapping of {key} to {value}"
    return f"a {field.message_type.name}"


def _check(name: str, token_ids: Sequence[int]) -> None:
    """UserError unless the wire can carry the ids; the server holds them to its vocabulary."""
    try:
        check_ids(name, token_ids, 1 << 32)
    except TypeError:
        raise UserError.of(name, f"in a {type(token_ids).__name__}", "must be a whole number") from None
