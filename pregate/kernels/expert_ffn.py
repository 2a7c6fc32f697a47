"""The one fast entry point of the expert FFN. Which implementation runs is chosen once, at start, and logged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.kernels import cpu
from pregate.kernels.cpu import LayerWeights

IMPLEMENTATIONS = ("auto", "loop", "grouped")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")

_log = get_logger(__name__)


class ExpertFFN(Protocol):
    """Runs experts on rows sorted by expert. Shape letters: P pairs, D hidden width, U experts used."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, x_PD: torch.Tensor, slots: np.ndarray, counts: np.ndarray, weights: LayerWeights
    ) -> torch.Tensor:
        """Return [P, D]: rows of `x_PD` through expert `slots[u]` of `weights`, `counts[u]` rows each, in order.

        `slots` [U] ascending, `counts` [U] positive with sum P.
        """
        ...


def choose(
    implementation: str, device: torch.device, dtype: torch.dtype, *, act: str, widths: Iterable[int]
) -> ExpertFFN:
    """Return the implementation for this machine; `widths` are all row lengths (hidden, expert) it will meet.

    Raises UserError when the named implementation is unknown or cannot run here; only "auto" chooses.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError.of("--expert-ffn", implementation, f"unknown; allowed: {', '.join(IMPLEMENTATIONS)}")
    if device.type != "cpu":
        raise UserError.of("--device", device, "no expert FFN for it; allowed: cpu")
    hindrance = cpu.why_not_grouped(widths, dtype) if implementation != "loop" else "asked for by name"
    if implementation == "grouped" and hindrance:
        raise UserError.of("--expert-ffn", implementation, f"not possible here: {hindrance}; allowed: auto, loop")
    ffn = cpu.LoopFFN(act) if hindrance else cpu.GroupedFFN(act)
    reason = hindrance or "sorted rows; a loop where every expert has one row"
    _log.info("expert FFN on %s in %s: %s (%s)", device, str(dtype).removeprefix("torch."), ffn.name, reason)
    return ffn


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in. "auto" is float32 on a CPU, whatever the checkpoint is stored in.

    Raises UserError for an unknown name and for one this machine has no instructions for.
    """
    if name not in COMPUTE_DTYPES:
        raise UserError.of("--dtype", name, f"unknown; allowed: {', '.join(COMPUTE_DTYPES)}")
    dtype = torch.float32 if name == "auto" else getattr(torch, name)
    if device.type == "cpu" and (hindrance := cpu.why_not_dtype(dtype)):
        raise UserError.of("--dtype", name, f"{hindrance}; allowed here: auto, float32")
    return dtype
