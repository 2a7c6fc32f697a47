"""Whether torch computes dynamic int8 products right on this CPU; without VNNI instructions some builds do not."""

from __future__ import annotations

import pytest
import torch

from pregate.kernels.expert_ffn import why_not

HINDRANCE = why_not("int8", torch.device("cpu"), torch.float32, "silu", (64,))
needs_int8 = pytest.mark.skipif(bool(HINDRANCE), reason=HINDRANCE)
