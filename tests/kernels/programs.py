"""Programs of the tests that need a process of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def hindrance() -> str:
    """Why the kernels cannot be interpreted here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 8) and numpy >= (2, 4):
        return f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}"
    return ""


def run_program(
    program: Path, *arguments: object, interpret: bool, timeout_s: float = 800, **environment: str
) -> list[dict[str, Any]]:
    """What `program` prints, a line of JSON each; AssertionError with the end of what it said if it fails."""
    ours = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": str(int(interpret))}
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
