"""What a measurement ran on: command, date, versions, hardware, load."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pregate.convert.report.conditions import processor

ROOT = Path(__file__).resolve().parents[1]


def shown(argument: object) -> str:
    """A command's argument as it may be written down: no folder that only this machine has.

    A path in the repository or in `shared` beside it is given relative to the repository, any other that is absolute or
    leads upwards by its last name.
    """
    path = Path(str(argument))
    if not path.is_absolute() and ".." not in path.parts:
        return str(argument)
    whole = Path(os.path.normpath(ROOT / path))
    known = whole.is_relative_to(ROOT) or whole.is_relative_to(ROOT.parent / "shared")
    return os.path.relpath(whole, ROOT) if known else whole.name


def command_of(module: str) -> str:
    """The command of this run of `benchmarks.<module>`."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *map(shown, sys.argv[1:])])


def surroundings(module: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Command, versions, hardware and time of this run of `benchmarks.<module>`; `packages` beside torch and NumPy."""
    return {
        "command": command_of(module),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", *packages)},
        "hardware": {"cpu": processor(), "cores": os.cpu_count()},
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def sentence(around: dict[str, Any]) -> str:
    """The same in one line of Markdown, without a full stop."""
    versions = ", ".join(f"{k} {v}" for k, v in around["versions"].items())
    hardware = f"{around['hardware']['cpu']}, {around['hardware']['cores']} cores"
    return (
        f"`{around['command']}`, {around['date']}; {versions}; {hardware}, {around['torch_threads']} torch threads; "
        f"load average {around['load_average']:.2f}"
    )
