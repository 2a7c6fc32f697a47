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


def surroundings(module: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Command, versions, hardware and time of this run of `benchmarks.<module>`; `packages` beside torch and NumPy."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", *packages)},
        "hardware": {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()},
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


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
