"""A field of options: what it is annotated with, and what it takes, in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import annotated_types
from pydantic.fields import FieldInfo

from pregate.base.choices import Kind
from pregate.base.sizes import EXAMPLES, SIZE

T = TypeVar("T")
#: What a value is called, and what several are.
_NAMES = {
    bool: ("true or false", "values true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


@dataclass(frozen=True)
class Key:
    """The option's name for users, where the field's alone would say too little outside of its class."""

    name: str


@dataclass(frozen=True)
class Word:
    """What users write for None, which is `none` elsewhere; or, where they cannot, what the help says it means."""

    text: str
    written: bool = True


@dataclass(frozen=True)
class Needs:
    """What must lie at a path for the work to begin."""

    what: Literal["nothing", "text"] | Kind


@dataclass(frozen=True)
class Or:
    """The option that may be given in the place of a required one; the class's `follow` makes that one of it."""

    name: str


#: A field that code sets; users cannot.
INTERNAL = Key("")


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """Return the fields of a class of options, or of an object of one."""
    return cls.__pydantic_fields__


def mark(info: FieldInfo, kind: type[T]) -> T | None:
    """Return what of that kind the field is annotated with."""
    return next((m for m in info.metadata if isinstance(m, kind)), None)


def kinds(info: FieldInfo) -> list[Any]:
    """Return the types a field takes, None aside. Example: [int] of int | None."""
    hint = info.annotation
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [kind for kind in members if kind is not type(None)]


def named(hint: Any, many: bool = False) -> str:
    """Return what a type of values is called. Example: "a list of whole numbers" of list[int]."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(named(kind, many) for kind in inner if kind is not type(None))
    if origin in (list, tuple):
        return f"{'lists' if many else 'a list'} of {named(inner[0], many=True)}"
    return _NAMES.get(hint, ("an object", "objects"))[many]


def choices(info: FieldInfo) -> list[str]:
    """Return the values of a field that takes only some; else nothing."""
    return [str(v) for kind in kinds(info) if typing.get_origin(kind) is Literal for v in typing.get_args(kind)]


def allowed(info: FieldInfo) -> str:
    """Say what a field takes. Example: "1 or more"."""
    bounds: dict[str, Any] = {}
    for constraint in info.metadata:
        if isinstance(constraint, annotated_types.BaseMetadata) and dataclasses.is_dataclass(constraint):
            bounds |= dataclasses.asdict(constraint)
    low, above, high, below = (bounds.get(name) for name in ("ge", "gt", "le", "lt"))
    words = choices(info)
    if "multiple_of" in bounds:
        words = [f"multiples of {bounds['multiple_of']}"]
    elif above is not None:
        words = [f"between {above} and {below}"] if below is not None else [f"above {above}"]
        words += [f"at most {high}"] if high is not None else []
    elif low is not None:
        words = [f"{low} or more" if high is None else f"{low} to {high}"]
    elif not words:
        words = [named(info.annotation)]
    word = mark(info, Word)
    words += [f"also as {EXAMPLES}"] if SIZE in info.metadata else []
    return ", ".join(words) + (f", or {word.text}" if word and word.written else "")


def key_of(name: str, info: FieldInfo) -> str:
    """Return what users call the option."""
    key = mark(info, Key)
    return key.name if key is not None and key.name else name
