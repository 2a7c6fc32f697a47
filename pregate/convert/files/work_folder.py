"""Files that are written whole, and the fingerprint that says what long work is of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pregate.base.errors import PregateError, option_name
from pregate.base.folders import sync_folder

#: Options that do not change the result, or that the fingerprint has otherwise than as they were typed.
_BESIDE_THE_POINT = (
    "model", "out", "calibration", "domains", "text", "teacher", "device", "checkpoint_every", "gradient_checkpointing",
)  # fmt: skip


def fingerprint(described: Mapping[str, Any], read: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything the result of work depends on, by name: options as they counted, what was `read`, and what does it
    (another of these may give other last bits). Values are what JSON gives back.
    """
    options = {option_name(name): value for name, value in described.items() if name not in _BESIDE_THE_POINT}
    versions = {name: version(name) for name in ("pregate", "torch", "transformers")}
    return {**options, **read, **versions, "device": device.type}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under another name, then sync and rename it: a file of this name is always whole, and
    after a loss of power still there.

    OSError or SafetensorError when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def writing(out: Path, what: Path) -> Iterator[None]:
    """PregateError where `what`, a file of the work on `out`, cannot be written in the block: the work is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = f"{what} cannot be written ({error}); what is done is kept, the same command goes on"
        raise PregateError(f"--out {out}: {reason}") from error
