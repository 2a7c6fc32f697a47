"""The text of one record of a `.jsonl` file: the forms that are read, and how their parts are joined.

| fields | text |
| --- | --- |
| `text` | as it is |
| `question`, `answer` | `Question: ...`, `Answer: ...`, a line each |
| `messages` or `conversations`: a list of turns with `role` and `content`, or `from` and `value` | `User: ...`, `Assistant: ...`, `System: ...`: a turn after a blank line |
| `instruction`, (`input`,) `output` | `Instruction: ...`, `Input: ...` where it is not empty, `Output: ...`, a line each |
| `prompt`, `completion` | one after the other, as they are |

The first that fits is taken. A field the user names is a string or a list of turns, and no other is looked at.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

from pregate.base.errors import UserError
from pregate.base.strict_json import parse_json
from pregate.model.tokenizer import text_bytes

_LABELLED = (("question", "answer"), ("instruction", "input", "output"), ("instruction", "output"))
_CHATS = ("messages", "conversations")
_SPEAKERS = {"human": "User", "gpt": "Assistant"}
FORMS = (
    '"text", "question" and "answer", "messages" or "conversations" with role and content (or from and value),'
    ' "instruction" and "output" (and "input"), "prompt" and "completion"'
)


def record_text(line: str, where: str, option: str, field: str | None) -> str:
    """The text of a record, or of its `field`; UserError names `option` and `where` (file and line)."""
    try:
        record: Any = parse_json(line)
    except ValueError as error:
        raise UserError.of(option, where, f"not a JSON record ({error})") from error
    if not isinstance(record, dict):
        raise UserError.of(option, where, f"a record needs fields, such as {FORMS}")
    value = None if field is None else record.get(field)
    text = _joined(record) if field is None else value if isinstance(value, str) else _chat(value)
    if text is not None:
        text_bytes(text, option, where)
        return text
    has = f"it has {', '.join(map(repr, record)) or 'none'}"
    if field is not None:
        raise UserError.of(option, where, f"field {field!r} is no string and no list of turns ({has})")
    raise UserError.of(option, where, f"a record needs {FORMS}; {has}; --text-field names another field")


def _joined(record: dict[str, Any]) -> str | None:
    """The text of a record of a known form; None where it is of none."""
    if isinstance(record.get("text"), str):
        return record["text"]
    for names in _LABELLED:
        if _strings(record, names):
            parts = [name for name in names if record[name] or name != "input"]
            return "\n".join(f"{name.capitalize()}: {record[name]}" for name in parts)
    for name in _CHATS:
        if (chat := _chat(record.get(name))) is not None:
            return chat
    return record["prompt"] + record["completion"] if _strings(record, ("prompt", "completion")) else None


def _strings(record: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(isinstance(record.get(name), str) for name in names)


def _chat(turns: Any) -> str | None:
    """Turns joined, each `Role: content`, by blank lines; None where they are no list of turns."""
    if not isinstance(turns, list) or not turns:
        return None
    said = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        said.append(f"{_SPEAKERS.get(role, role.capitalize())}: {content}")
    return "\n\n".join(said)
