"""Torch tensors as `Rows` of the protocol and back, without copying.

Both run for every group, so they use no torch operator where NumPy has a cheaper constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from pregate.base.errors import UserError
from pregate.workers.link.protocol import Rows

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in _DTYPES.items()})
#: NumPy has no bfloat16; its bits travel as integers.
_NUMPY: Mapping[str, np.dtype] = MappingProxyType(
    {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.int16), "float16": np.dtype(np.float16)}
)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the protocol's name of a dtype; UserError when rows cannot travel in it."""
    if dtype not in _NAMES:
        raise UserError.of("dtype of rows", dtype, f"allowed: {', '.join(_DTYPES)}")
    return _NAMES[dtype]


def to_rows(x_ND: torch.Tensor) -> Rows:
    """Wrap a CPU tensor [N, D]; the bytes stay the tensor's own where it is contiguous."""
    num_rows, width = x_ND.shape
    if x_ND.requires_grad:
        x_ND = x_ND.detach()
    if not x_ND.is_contiguous():
        x_ND = x_ND.contiguous()
    name = dtype_name(x_ND.dtype)
    if not num_rows or not width:
        return Rows(name, (num_rows, width), b"")
    bits = x_ND.view(torch.int16) if name == "bfloat16" else x_ND
    return Rows(name, (num_rows, width), bits.numpy().data.cast("B"))


def from_rows(rows: Rows) -> torch.Tensor:
    """Return a CPU tensor [N, D] over the received bytes (a copy where they do not start on a whole value)."""
    bits = np.ndarray(rows.shape, _NUMPY[rows.dtype], rows.data)
    if not bits.flags.aligned:
        bits = bits.copy()
    x_ND = torch.from_numpy(bits)
    return x_ND.view(torch.bfloat16) if rows.dtype == "bfloat16" else x_ND
