"""Weights as the checkpoint stores them: figures are measured on these, and layers are cut from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError

#: Elements rounded at a time: bounds the copies made on the way.
ROUND_ELEMENTS = 1 << 22


def round_to(tensors: Iterable[torch.Tensor], dtype: torch.dtype, what: str) -> None:
    """Round float32 tensors in place to what `dtype` can hold; UserError where a value becomes infinite."""
    if dtype == torch.float32:
        return
    parts = (part for t in tensors if t.is_floating_point() for part in t.view(-1).split(ROUND_ELEMENTS))
    for part in parts:
        part.copy_(part.to(dtype))
        if not torch.isfinite(part).all():
            name = dtype_name(dtype)
            raise UserError.of("--dtype", name, f"{what} has values it cannot hold; allowed: bfloat16, float32")


def as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the checkpoint holds it: weights in `dtype`, integers as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
