"""Options, defined once: a class of them gives Python's constructor, the command line's flags and a deployment's keys.

An option is a field, `Annotated` with its bounds and its line of help (a string), and with `Key`, `Word`, `INTERNAL`
or `Needs` where it has more to say. Only what reads options imports this file: it loads pydantic.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import annotated_types
import pydantic.dataclasses
from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from pregate.base.choices import Kind
from pregate.base.errors import UserError, option_name
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
#: Of whole numbers, and of seconds: a year.
_MOST, _MOST_SECONDS = (1 << 63) - 1, 365 * 86_400
#: A class is not built before it is used: one command of many is.
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


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

Model = Annotated[Path, Field(description="Model folder."), Needs("model")]
#: A model folder, or an adapter in its place; see `follow_adapter`.
ModelOrAdapter = Annotated[Path, Field(description="Model folder."), Needs("model"), Or("adapter")]
Checkpoint = Annotated[Path, Field(description="Checkpoint folder."), Needs("routed")]
CheckpointOrAdapter = Annotated[Path, Field(description="Checkpoint folder."), Needs("routed"), Or("adapter")]
Adapter = Annotated[
    Path | None, Field(description="Adapter in place of --model; its dense model is --parent."), Needs("model")
]
Parent = Annotated[
    Path | None,
    Field(description="The dense parent."),
    Needs("model"),
    Word("the one the manifest names, if it is there", written=False),
]
Out = Annotated[Path, Field(description="Folder to write; must not exist."), Needs("nothing")]
#: Files, folders and patterns of text; what for is the description of the field.
Texts = Annotated[tuple[Path, ...], Field(min_length=1), Needs("text")]
TextField = Annotated[
    str | None,
    Field(description="Field of a .jsonl record that is its text."),
    Word("text, or by the record's form", written=False),
]
Seed = Annotated[int, Field(ge=0, description="Seed of every random choice.")]
Dtype = Literal["float32", "float16", "bfloat16"]
Device = Annotated[str, Field(description="auto (a GPU when there is one), cpu, cuda or cuda:N.")]
Restart = Annotated[bool, Field(description="Discard what an interrupted run left.")]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def options(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class one of options: a frozen dataclass whose values are read and checked by the fields' types.

    UserError names a value that is not allowed. A class method `follow(given)` may add to what is given defaults that
    depend on it; checks across fields are `__post_init__`'s.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=kw_only, config=_CONFIG)(cls)
        init = made.__init__
        names = [f.name for f in dataclasses.fields(made) if f.init and not f.kw_only]

        @functools.wraps(init)
        def checked(self: Any, *arguments: Any, **named: Any) -> None:
            if not made.__pydantic_complete__:  # building it gives it pydantic's own constructor
                pydantic.dataclasses.rebuild_dataclass(made)
                made.__init__ = checked
            if len(arguments) > len(names):
                most = f"{len(names)}, {', '.join(names)}" if names else "none"
                raise UserError(f"{cls.__name__}: {len(arguments)} values without a name; allowed: {most}")
            given = dict(zip(names, arguments, strict=False))
            if twice := sorted(given.keys() & named.keys()):
                raise UserError(f"{option_name(twice[0])}: given twice")
            given |= named
            for name, info in fields_of(made).items():
                if isinstance(given.get(name), bool) and bool not in kinds(info):  # to pydantic True is 1
                    raise _not_allowed(name, info, given[name])
            try:
                init(self, **(made.follow(given) if hasattr(made, "follow") else given))
            except pydantic.ValidationError as error:
                raise _sentence(made, error) from None
            for name, info in fields_of(made).items():
                _check_size(name, info, getattr(self, name))

        made.__init__ = checked
        return made

    return decorate


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


def _check_size(name: str, info: FieldInfo, value: object) -> None:
    """UserError for a number that what it goes to, a message or a clock, cannot hold."""
    is_time = name.endswith("_s") or name == "timeout"
    most = _MOST_SECONDS if is_time else _MOST
    if isinstance(value, (int, float) if is_time else int) and value > most:
        raise UserError.of(option_name(key_of(name, info)), value, f"allowed: at most {most}")


def _not_allowed(name: str, info: FieldInfo, value: object) -> UserError:
    return UserError.of(option_name(key_of(name, info)), value, f"allowed: {allowed(info)}")


def _sentence(cls: Any, error: pydantic.ValidationError) -> UserError:
    """The first thing wrong with the options of `cls`, in the house's words."""
    first = error.errors()[0]
    if isinstance(raised := first.get("ctx", {}).get("error"), UserError):
        return raised
    name, value = str(first["loc"][0]), first["input"]
    if first["type"] == "unexpected_keyword_argument":
        wrong = {option_name(str(e["loc"][0])): e["input"] for e in error.errors() if e["type"] == first["type"]}
        return UserError.of_unknown(wrong, fields_of(cls))
    info = fields_of(cls)[name]
    option = option_name(key_of(name, info))
    if first["type"] == "missing":
        other = mark(info, Or)
        instead = f"; allowed in its place: {option_name(other.name)}" if other else ""
        return UserError(f"{option}: missing; it has no default{instead}")
    if first["type"] == "too_short":
        least = first.get("ctx", {}).get("min_length")
        what = " files, folders or patterns of text" if mark(info, Needs) else ""
        return UserError(f"{option}: {len(value)} given; allowed: {least} or more{what}")
    if first["type"].startswith(("int_", "float_")) and (what := named(info.annotation)) != (words := allowed(info)):
        return UserError.of(option, value, f"allowed: {what}, {words}")
    return _not_allowed(name, info, value)


def follow_adapter(given: dict[str, Any]) -> dict[str, Any]:
    """For `follow`: the folder of `adapter` is the model, where no other is given."""
    adapter = given.get("adapter")
    return given if adapter is None or given.get("model") is not None else given | {"model": adapter}


def check_adapter(model: object, adapter: object, parent: object) -> None:
    """For `__post_init__`: UserError for an adapter without its parent, or beside a model."""
    if adapter is None:
        return
    if Path(str(model)) != Path(str(adapter)):
        raise UserError.of("--model", model, f"give it or --adapter {adapter}, not both")
    if parent is None:
        raise UserError.of("--adapter", adapter, "needs --parent, the dense model that it was made from")


# ---- names and keys ----


def key_of(name: str, info: FieldInfo) -> str:
    """Return what users call the option."""
    key = mark(info, Key)
    return key.name if key is not None and key.name else name


@dataclass(frozen=True)
class Option:
    """One option as users see it. `path`: the fields that lead to it, options within options being one flat list."""

    key: str
    path: tuple[str, ...]
    info: FieldInfo

    @property
    def flag(self) -> str:
        return option_name(self.key)

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(kind) is tuple for kind in kinds(self.info))


def user_options(cls: Any) -> dict[str, Option]:
    """Return all that users can say of `cls`, by name, in the order of the fields.

    What it holds of other options' classes is among them, but for `INTERNAL` fields and those of a name that `cls` has
    itself, which it sets.
    """
    found: dict[str, Option] = {}
    for name, info in fields_of(cls).items():
        (kind, *_) = kinds(info)
        if dataclasses.is_dataclass(kind):
            inner = {k: Option(k, (name, *o.path), o.info) for k, o in user_options(kind).items()}
            found |= {k: o for k, o in inner.items() if k not in fields_of(cls)}
        elif mark(info, Key) is not INTERNAL:
            found[key_of(name, info)] = Option(key_of(name, info), (name,), info)
    return found


def of_keys(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build `cls` from what users say, by key; strings are read as the fields' types. UserError for unknown keys."""
    known = user_options(cls)
    nested: dict[str, Any] = {}
    if wrong := {key: value for key, value in values.items() if key not in known}:
        raise UserError.of_unknown(wrong, known)
    for key, value in values.items():
        inner = nested
        for name in known[key].path[:-1]:
            inner = inner.setdefault(name, {})
        inner[known[key].path[-1]] = value
    return from_dict(cls, nested)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Undo `to_dict`. Strings are read as the fields' types: "2" for an int, `none` or the field's word for None."""
    read = dict(values)
    for name in values.keys() & fields_of(cls).keys():
        info, value = fields_of(cls)[name], values[name]
        (kind, *_), word = kinds(info), mark(info, Word)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UserError.of(name, value, "allowed: a mapping of options")
            read[name] = from_dict(typing.cast("Any", kind), value)
        elif value == (word.text if word and word.written else "none") and kind is not info.annotation:
            read[name] = None
    return cls(**read)


def to_dict(given: Any) -> dict[str, Any]:
    """Plain values, to cross Ray: options within become dicts, tuples lists and paths text."""
    return pydantic.TypeAdapter(type(given)).dump_python(given, mode="json")


def shown(given: Any) -> dict[str, str]:
    """What users can say of options, as text by name; secrets are paths in any case."""
    found = {}
    for key, option in user_options(type(given)).items():
        value = to_dict(given)
        for name in option.path:
            value = value[name]
        found[key] = str(value)
    return found


def described(given: Any, **counted: Any) -> dict[str, Any]:
    """What a manifest keeps of options: values as they `counted`, without what says nothing about the result."""
    return {name: value for name, value in (to_dict(given) | counted).items() if name not in ("restart", "recipe")}
