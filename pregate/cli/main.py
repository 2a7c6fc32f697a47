"""The `pregate` command. Commands live beside this file; here they get their names, and errors their exit codes.

0 done, 1 something failed (a server is gone, a machine is not fit), 2 the user can mend it, 130 Ctrl-C.
Errors are one line on stderr.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from pregate.base.errors import PregateError, UserError

#: Root of the argument parser's own errors (typer carries its parser within, or uses click's).
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")  # pyright: ignore[reportAssignmentType]

#: Where each command lies. Only the one that is asked for is loaded, so that what is wrong with it is said at once.
COMMANDS = {
    **dict.fromkeys(("convert", "decouple", "tune", "evaluate", "export", "apply"), "pregate.cli.model"),
    "read-me": "pregate.cli.read_me",
    "report": "pregate.cli.report",
    **dict.fromkeys(("generate", "route"), "pregate.cli.text"),
    **dict.fromkeys(("serve", "doctor"), "pregate.cli.serve"),
    "config": "pregate.cli.config",
    "scale": "pregate.cli.scale",
    "push": "pregate.cli.push",
    **dict.fromkeys(("status", "top"), "pregate.cli.status"),
    "chat": "pregate.cli.chat",
    "bench": "pregate.cli.bench",
}


def _app(names: Iterable[str]) -> typer.Typer:
    """The command line with the commands of these names."""
    app = typer.Typer(
        name="pregate",
        help="Turn a dense language model into a mixture of experts with paths known up front, and serve it on Ray.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # its tables cut the names of options at 80 columns
        callback=lambda: None,  # without one, a single command would have no name
    )
    for name in names:
        module = import_module(COMMANDS[name])
        if name == "bench":
            app.add_typer(module.app, name=name)
        else:
            epilog = module.describe_recipes() if name == "convert" else None
            app.command(name, epilog=epilog)(getattr(module, name.replace("-", "_")))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = _app(given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS)
    try:
        code = int(app(_spread(given, _list_options(app)) or ["--help"], standalone_mode=False) or 0)
        print(end="", flush=True)  # else a full disk is first met when Python ends
        return code
    except PregateError as error:
        code = 2 if isinstance(error, UserError) else 1
        return code if error.is_said else _fail(error.for_command_line, code)
    except _UsageError as error:
        return _fail(_describe(error, given), 2)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except OSError as error:
        return _fail(_refused(error), 1)


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"pregate: {' '.join(sentence.split())}\n")
    return code


def _refused(error: OSError) -> str:
    """What the machine would not do: a file that may not be read, a disk that is full."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"{type(error).__name__}: {reason}"
    with suppress(OSError, ValueError):  # what Python still holds of it cannot be written at its end, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"the output cannot be written: {reason}"


def _describe(error: Any, given: Sequence[str]) -> str:
    """The parser's sentence; with the value in it where it is about one, for the parser does not always say it."""
    for option in getattr(getattr(error, "param", None), "opts", []):
        if option in given[:-1]:
            return f"{option} {given[given.index(option) + 1]}: {error.message}"
    return error.format_message()


def _list_options(app: typer.Typer) -> frozenset[str]:
    """Options that take several values after one another: `--calibration a.txt b.jsonl`."""
    apps = [app, *(group.typer_instance for group in app.registered_groups if group.typer_instance)]
    return frozenset().union(*(getattr(c.callback, "list_flags", ()) for a in apps for c in a.registered_commands))


def _spread(arguments: Sequence[str], list_options: Collection[str]) -> list[str]:
    """Repeat a list option before each of its values, as the parser wants it.

    ["--text", "a", "b", "--seed", "1"] -> ["--text", "a", "--text", "b", "--seed", "1"]
    """
    spread: list[str] = []
    option, num_values = "", 0
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            option, num_values = argument if argument in list_options else "", 0
        elif option:
            num_values += 1
            if num_values > 1:
                spread.append(option)
        spread.append(argument)
    return spread


if __name__ == "__main__":
    sys.exit(main())
