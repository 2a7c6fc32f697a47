"""Chat messages in the place of a prompt: `Chat`, and `ChatTemplate`, the model's own, which makes a text of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pregate.base.errors import UserError, in_one_line
from pregate.model.tokenizer import read_object, tokenizer_folder

#: What OpenAI calls the system role today; templates that know only the older name get that.
_DEVELOPER, _SYSTEM = "developer", "system"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Chat:
    """Messages, each with a `role` and a `content`: text, or OpenAI's list of text parts. What else a message holds
    goes to the template as it is (`name`, `tool_calls`), but for what is None.

    `add_generation_prompt` False leaves out what opens the assistant's turn; `template_options` are further variables
    of the template, as vLLM's `chat_template_kwargs`.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """The chat template of a model folder, in the sandbox that transformers renders one in.

    The text it makes begins as the template says; no tokenizer is to add special tokens to it.
    """

    def __init__(self, model: Path) -> None:
        folder = tokenizer_folder(model)
        self._special = _special_tokens(folder)
        self._missing, self._template = "the model has no chat template; send a prompt instead", None
        source = _source(folder)
        if source is None:
            return
        self._knows_developer = _DEVELOPER in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            self._missing = f"the model's chat template cannot be read: {in_one_line(error)}; send a prompt instead"

    def render(self, chat: Chat) -> str:
        """Return the prompt. UserError without a template, for messages that are none, or that the template refuses.

        A system message that the template passes over is refused too, rather than lost.
        """
        if self._template is None:
            raise UserError(f"messages: {self._missing}")
        if not chat.messages:
            raise UserError.of("messages", "of length 0", "at least one is needed")
        messages = [self._message(number, message) for number, message in enumerate(chat.messages)]
        text = self._rendered(chat, messages)
        rest = [message for message in messages if message["role"] != _SYSTEM or not message.get("content")]
        if 0 < len(rest) < len(messages):
            try:
                lost = self._rendered(chat, rest) == text
            except UserError:
                lost = False
            if lost:
                raise UserError("messages: the model's chat template has no system role")
        return text

    def _rendered(self, chat: Chat, messages: list[dict[str, Any]]) -> str:
        assert self._template is not None
        given = {**self._special, "tools": None, "documents": None, **chat.template_options}
        given |= {"messages": messages, "add_generation_prompt": chat.add_generation_prompt}
        try:
            return self._template.render(given)
        except Exception as error:  # of a model's own program: many kinds
            reason = in_one_line(error)
            raise UserError(f"messages: the model's chat template does not take them: {reason}") from error

    def _message(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UserError.of(f"messages.{number}.role", json.dumps(role, default=repr), "must be a role's name")
        if role == _DEVELOPER and not self._knows_developer:
            role = _SYSTEM
        content = _text(f"messages.{number}.content", message.get("content"))
        return {k: v for k, v in {**message, "role": role, "content": content}.items() if v is not None}


def _text(name: str, content: object) -> str | None:
    """A message's content as one text; the texts of several parts become lines, as vLLM has it."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UserError.of(name, f"of {type(content).__name__}", "must be text or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise UserError.of(f"{name}.{number}", f"of type {kind}", 'allowed: {"type": "text", "text": ...}')
        texts.append(text)
    return "\n".join(texts)


def _source(folder: Path) -> str | None:
    """The template's text: a file of its own, else what the tokenizer's settings say; of several, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8-sig", errors="replace")
    given = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    fields = {**read_object(folder / "special_tokens_map.json"), **read_object(folder / "tokenizer_config.json")}
    given = {name: fields.get(name) for name in _SPECIAL_TOKENS}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is only what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Filters and functions that transformers gives a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML gives a meaning."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
