"""Frozen dataclasses to and from plain dicts, strictly: an unknown key or a value of the wrong kind is a UserError.

Options cross Ray and the Serve command line (`key=value`, all strings) as dicts; this is the one place that reads them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pregate.base.errors import UserError

T = TypeVar("T")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def to_dict(options: Any) -> dict[str, Any]:
    """Plain values only; nested options become dicts and paths text."""
    return dataclasses.asdict(options, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in items}


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build `cls` from a dict. Strings are read as the field's type ("2" for an int), nested dicts as nested options.

    Raises UserError naming the key (`where` is put before it), its value and what is allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError.of(f"{where}{key}", values[key], f"unknown option; allowed: {', '.join(fields)}")
    missing = [name for name, f in fields.items() if name not in values and _is_required(f)]
    if missing:
        raise UserError(f"{where}{missing[0]}: missing; it has no default")
    return cls(**{key: _read(hints[key], value, where + key) for key, value in values.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _read(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value == "none" and type(None) in arguments):
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _read(hint, value, name)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return from_dict(typing.cast("type[Any]", hint), value, f"{name}.")
        raise UserError.of(name, value, "must be a mapping of options")
    if origin is tuple:
        return tuple(_read(arguments[0], item, name) for item in value)
    return _read_scalar(hint, value, name)


def _read_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is bool:
        if isinstance(value, str) and value.lower() in _BOOLS:
            return _BOOLS[value.lower()]
    elif hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            pass
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str) and type(value) is not hint:
        raise UserError.of(name, value, f"must be {_KINDS[hint]}")
    return value
