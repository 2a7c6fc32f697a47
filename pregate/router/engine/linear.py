"""Products and norms of the lean decoder, in the form that costs least where they run.

Shape letters: T tokens, N outputs, K inputs, D width that is normed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels.cpu.packed import PackedFFN, Product, product_of

Norm = Callable[[torch.Tensor], torch.Tensor]


class Linear:
    """x [T, K] -> [T, N]. On a CPU that has packed products for the dtype the weight is held packed, and nothing else
    of it."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        weight_NK = weight_NK.detach()
        self.bias_N = None if bias_N is None else bias_N.detach().clone()
        packed = weight_NK.device.type == "cpu" and not PackedFFN.why_not(weight_NK.dtype, weight_NK.shape)
        self._product: Product = product_of(weight_NK) if packed else partial(F.linear, weight=weight_NK.clone())

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        y_TN = self._product(x_TK)
        return y_TN if self.bias_N is None else y_TN.add_(self.bias_N)

    @classmethod
    def joined(cls, parts: list[nn.Linear]) -> Linear:
        """The outputs of several layers side by side, in one product."""
        biases = [part.bias for part in parts if part.bias is not None]
        if len(biases) not in (0, len(parts)):
            raise ValueError("some of the layers have a bias and some have none")
        weight_NK = parts[0].weight if len(parts) == 1 else torch.cat([p.weight.detach() for p in parts])
        return cls(weight_NK, torch.cat([b.detach() for b in biases]) if biases else None)


class RMSNorm:
    """x / rms(x) * weight, over the last axis; on a CPU in fp32 with few small operations, for there each costs more
    than its arithmetic."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self.weight_D, self.eps = weight_D.detach().clone(), eps
        self.size = tuple(weight_D.shape)
        self._eps = torch.tensor([eps], dtype=torch.float32, device=weight_D.device)
        self._few = weight_D.device.type == "cpu" and weight_D.dtype == torch.float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._few:
            return F.rms_norm(x, self.size, self.weight_D, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / self.size[0]).rsqrt_()
        return (x * scale).mul_(self.weight_D)

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module) -> Norm:
        """`module` as an `RMSNorm` where that is what it computes, with its weight or 1 + its weight; else itself."""
        weight = getattr(module, "weight", None)
        eps = next((v for n in ("variance_epsilon", "eps") if isinstance(v := getattr(module, n, None), float)), None)
        if not isinstance(weight, torch.Tensor) or eps is None:
            return module
        x = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
        expected = module(x)
        for candidate in (cls(weight, eps), cls(1 + weight.float(), eps), cls((1 + weight.float()).to(weight), eps)):
            found = candidate(x)
            if found.dtype == x.dtype and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return candidate
        return module
