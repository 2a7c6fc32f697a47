"""Which device a conversion computes on."""

from __future__ import annotations

import torch

from pregate.base.errors import UserError

_ALLOWED = "allowed: auto, cpu, cuda or cuda:N"


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU; UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())) or name.endswith(":"):
        raise UserError.of("--device", name, _ALLOWED)
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError.of("--device", name, f"this machine has {torch.cuda.device_count()} CUDA devices; {_ALLOWED}")
    return torch.device(name)
