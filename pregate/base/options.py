"""Options, defined once: a class of them gives Python's constructor, the command line's flags and a deployment's keys.

An option is a field, `Annotated` with its bounds and its line of help (a string), and with `Key`, `Word`, `INTERNAL`
or `Needs` where it has more to say. Only what reads options imports this file: it loads pydantic.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic.dataclasses
from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from pregate.base.errors import UserError, option_name
from pregate.base.option_fields import INTERNAL, Key, Needs, Or, Word, allowed, fields_of, key_of, kinds, mark, named

T = TypeVar("T")
#: Of whole numbers, and of seconds: a year.
_MOST, _MOST_SECONDS = (1 << 63) - 1, 365 * 86_400
#: A class is not built before it is used: one command of many is.
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)

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
