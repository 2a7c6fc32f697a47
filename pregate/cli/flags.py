"""A command's flags, made of the classes of options it takes (`base/options.py`)."""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pregate.base.option_fields import Needs, Or, Word, choices, kinds, mark
from pregate.base.options import Option, of_keys, user_options
from pregate.base.sizes import EXAMPLES, SIZE
from pregate.convert.text.documents import text_files
from pregate.model.checkpoint import check_new_folder
from pregate.model.folder import is_gguf, read_folder

#: Of the file of settings, among the options.
_FILE = "config"
_METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH"}


def command(*classes: type[Any], settings: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function of one object of each class a command whose flags are the fields of all of them.

    What the user gave is read and checked by the classes, and paths are looked at, before the function is called. With
    `settings` a file and variables give what flags do not (`base/settings.py`), and the function is told where from.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        known = [user_options(cls) for cls in classes]

        def called(**given: Any) -> None:
            given = {key: value for key, value in given.items() if value not in (None, [])}
            sources: list[dict[str, str]] = []
            if settings:
                from pregate.base.settings import gather

                file = given.pop(_FILE, None)
                given, where = gather(functools.reduce(operator.or_, known), given, file and Path(file))
                sources.append(where)
            parts = [{key: given[key] for key in options if key in given} for options in known]
            objects = [of_keys(cls, part) for cls, part in zip(classes, parts, strict=True)]
            for options, built in zip(known, objects, strict=True):
                check_paths(options.values(), built)
            run(*objects, *sources)

        called.__name__, called.__doc__ = run.__name__, run.__doc__
        parameters = [_parameter(option) for options in known for option in options.values()]
        if settings:  # what is required may come from there
            parameters = [p.replace(default=None) for p in parameters] + [_file_parameter()]
        parameters.sort(key=lambda parameter: parameter.default is None)  # those without a default first
        called.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        called.list_flags = frozenset(o.flag for options in known for o in options.values() if o.is_list)  # pyright: ignore[reportFunctionMemberAccess]
        return called

    return decorate


def check_paths(options: Iterable[Option], built: Any) -> None:
    """Look at the paths among the options of `built`; UserError names the flag of one that cannot do."""
    parent = None if getattr(built, "parent", None) is None else Path(built.parent)
    for option in options:
        needs, value = mark(option.info, Needs), built
        for name in option.path:
            value = getattr(value, name)
        if needs is None or not value:
            continue
        paths = [Path(path) for path in (value if option.is_list else [value])]
        if needs.what == "text":
            text_files(paths, option.flag)
            continue
        for path in paths:
            if needs.what == "nothing":
                check_new_folder(path, option.flag)
            elif needs.what != "dense" or not is_gguf(path):
                adapter = getattr(built, "adapter", None)
                flag = option.flag if adapter is None or path != Path(adapter) else "--adapter"
                read_folder(path, flag, parent).check(needs.what)


def _metavar(kind: Any) -> str:
    return _METAVARS.get(kind, "TEXT")


def _file_parameter() -> inspect.Parameter:
    text = "YAML file of options; flags and variables PREGATE_... come before it."
    flag = typer.Option("--config", help=text, metavar="PATH", show_default=False)
    annotation = Annotated[str | None, flag]
    return inspect.Parameter(_FILE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(option: Option) -> inspect.Parameter:
    """One flag, as typer reads it from a function. Values come as text, to be read with the others by their class."""
    info = option.info
    word, (kind, *_) = mark(info, Word), kinds(info)
    text = info.description or mark(info, str) or ""
    if option.is_list and (needs := mark(info, Needs)) and needs.what == "text":
        text += ": .txt, .jsonl, folders or patterns of them."
    shown: Any = False if info.is_required() else word.text if info.default is None and word else info.default
    names, hint, metavar = [option.flag], str | None, _metavar(kind)
    if kind is bool:
        names, hint, metavar = [option.flag + (f"/--no-{option.flag[2:]}" if info.default else "")], bool | None, None
    elif option.is_list:
        hint, metavar, shown = list[str] | None, f"{_metavar(typing.get_args(kind)[0])}...", False
    elif values := choices(info):
        metavar = f"[{'|'.join(values)}]"
    if SIZE in info.metadata:
        metavar, text = f"{metavar}|SIZE", f"{text} A SIZE is as {EXAMPLES}."
    if word and word.written and metavar:
        metavar += f"|{word.text}"
    required = info.is_required() and not mark(info, Or)
    default = inspect.Parameter.empty if required else None
    if required:
        hint = typing.get_args(hint)[0]
    if shown not in (None, False, ""):
        text += f" Default: {shown}."
    flag = typer.Option(*names, help=text, metavar=metavar, show_default=False)
    return inspect.Parameter(
        option.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, flag]
    )
