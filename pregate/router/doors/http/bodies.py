"""What may be asked for: OpenAI's bodies with OpenAI's defaults, and vLLM's names beside them.

What pregate cannot do is refused unless it is at its neutral value; a field nobody knows is refused too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from typing_extensions import Self

from pregate.base.errors import UserError
from pregate.base.option_fields import allowed
from pregate.base.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS
from pregate.router.doors.chat import Chat
from pregate.router.link.messages import SamplingParams

#: Completions of one request: its prompts times `n`.
MAX_CHOICES = 512
_DEFAULT_MAX_TOKENS = 16
_Neutral = Mapping[str, tuple[Any, ...]]


class _Strict(BaseModel):
    """JSON as it is: true is no 1, nor is "1". What is wrong is said in the house's words."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, given: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        names = given if isinstance(given, dict) else {}
        unknown = () if cls.model_config.get("extra") == "allow" else names.keys() - cls.model_fields.keys()
        if wrong := {name[:80]: json.dumps(names[name])[:80] for name in names if name in unknown}:
            raise UserError.of_unknown(wrong, cls.model_fields)
        try:
            return read(given)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"] or isinstance(first.get("ctx", {}).get("error"), UserError):
                raise
            name = str(first["loc"][0])
            if name not in names:
                raise UserError(f"{name}: missing") from None
            takes = allowed(cls.model_fields[name])
            raise UserError.of(name, json.dumps(names[name])[:80], f"allowed: {takes}") from None


class Body(_Strict):
    """What every body may name."""

    model: str = ""


class StreamOptions(_Strict):
    """`include_usage`: a last event carries the counts."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """What completions and chats have in common."""

    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: int | None = 1
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = None
    min_tokens: int | None = 0
    priority: int = 0
    user: str | None = None
    #: What is refused, and the values that ask for nothing.
    neutral: ClassVar[_Neutral] = {}

    @property
    def names_max_tokens(self) -> bool:
        """Whether the client says how long a text may be."""
        return self.max_tokens is not None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """Return the sampling part. Raises UserError for a field that is set and not supported."""
        for name, values in self.neutral.items():
            if getattr(self, name) not in values:
                raise UserError.of(name, json.dumps(getattr(self, name))[:80], "is not supported; leave it out")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise UserError.of("stream_options.include_obfuscation", "true", "is not supported; leave it out")
        stop = [self.stop] if isinstance(self.stop, str) and self.stop else self.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            top_k=0 if self.top_k == -1 else self.top_k or 0,  # vLLM's -1 is every token
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_bias(self.logit_bias or {}),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=tuple(stop),
            n=1 if self.n is None else self.n,
        )


class CompletionBody(SamplingBody):
    """`/v1/completions`. With `echo` the prompt comes before the text, its logprobs before the text's, and max_tokens
    may be 0."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = 1
    suffix: str | None = None
    neutral: ClassVar[_Neutral] = {"best_of": (None, 1), "suffix": (None, "")}

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Return the prompts, each text or ids. Raises UserError for too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            allowed = f"allowed: at most {MAX_CHOICES} completions, n of each"
            raise UserError.of("prompt", f"of {len(self.prompt)} prompts", allowed)
        return [item for item in self.prompt if not isinstance(item, int)]

    def sampling(self) -> SamplingParams:
        """Return what to ask for. `echo` asks for the prompt's logprobs too."""
        most = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        return self.params(
            max_tokens=1 if self.only_echo else most, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs
        )

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated."""
        return bool(self.echo) and self.max_tokens == 0


class Message(_Strict):
    """One of a chat. What it holds beside goes to the model's template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(SamplingBody):
    """`/v1/chat/completions`. Without max_completion_tokens a text may be as long as the context leaves."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = False
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    neutral: ClassVar[_Neutral] = {
        "store": (None, False),
        "response_format": (None, {"type": "text"}),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, False, True),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "reasoning_effort": (None,),
        "verbosity": (None,),
    }

    @property
    def names_max_tokens(self) -> bool:
        return self.max_tokens is not None or self.max_completion_tokens is not None

    def chat(self) -> Chat:
        """Return the prompt."""
        messages = [message.model_dump() for message in self.messages]
        return Chat(messages, self.add_generation_prompt, self.chat_template_kwargs or {})

    def sampling(self) -> SamplingParams:
        """Return what to ask for. `logprobs` is a switch here, and `top_logprobs` the number."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise UserError.of("max_completion_tokens", self.max_completion_tokens, "must be at least 1")
        top = self.top_logprobs or 0
        if not 0 <= top <= MAX_TOP_LOGPROBS:
            raise UserError.of("top_logprobs", top, f"must be 0 to {MAX_TOP_LOGPROBS}")
        if top and not self.logprobs:
            raise UserError.of("top_logprobs", top, "needs logprobs true")
        logprobs = top if self.logprobs else None
        return self.params(max_tokens=MAX_TOKENS if most is None else most, logprobs=logprobs, prompt_logprobs=None)


class TokenizeBody(Body):
    """`/tokenize`: a prompt or messages, as vLLM has it. `add_special_tokens` None: as the prompt would be sent."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    def text(self) -> str | Chat:
        """Return what to tokenise. Raises UserError unless there is just one of the two."""
        return _one_of(self.prompt, self.messages, self.add_generation_prompt, self.chat_template_kwargs)


class RouteBody(Body):
    """`/v1/route`: a prompt, as text or ids, or messages."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def input(self) -> str | list[int] | Chat:
        """Return what to route. Raises UserError unless there is just one of the two."""
        return _one_of(self.prompt, self.messages, self.add_generation_prompt, self.chat_template_kwargs)


class DetokenizeBody(Body):
    """`/detokenize`."""

    tokens: list[int]


def _one_of(prompt: Any, messages: list[Message] | None, opens: bool, options: Mapping[str, Any] | None) -> Any:
    if (prompt is None) == (messages is None):
        raise UserError("prompt: give it or messages, one of the two")
    return prompt if messages is None else Chat([message.model_dump() for message in messages], opens, options or {})


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = next((name for name in given if not name.isdecimal() or len(name) > 20), None)
    if wrong is not None:
        raise UserError.of("logit_bias", json.dumps(wrong)[:40], "must be a token id")
    return tuple(sorted((int(name), value) for name, value in given.items()))
