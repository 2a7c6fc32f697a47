"""What a request may say, in Python's words, and the messages that say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, TypeVar

from pregate.base.errors import UserError
from pregate.base.sampling import check_ids
from pregate.client.proto import pregate_pb2 as pb

_T = TypeVar("_T")
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
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError("messages: must be a list of mappings with role and content")
    return {"chat": pb.ChatInput(messages=[build(pb.ChatMessage, **message) for message in messages])}


def build(kind: type[_T], **fields: Any) -> _T:
    """A message; UserError for a value that its field cannot carry."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:  # protobuf's words
        raise UserError(f"{kind.__name__}: {error}") from None


def _check(name: str, token_ids: Sequence[int]) -> None:
    """UserError unless the wire can carry the ids; the server holds them to its vocabulary."""
    try:
        check_ids(name, token_ids, 1 << 32)
    except TypeError:
        raise UserError.of(name, f"in a {type(token_ids).__name__}", "must be a whole number") from None
