"""The way from the host's memory to a device."""

from __future__ import annotations

import torch


def to_device(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`array` on `device`; from the host to a CUDA device in a pinned copy that nobody waits for."""
    if device.type != "cuda" or array.is_cuda:
        return array.to(device)
    return array.pin_memory().to(device, non_blocking=True)
