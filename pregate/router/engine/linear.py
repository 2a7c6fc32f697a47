"""Products and norms of the lean decoder, in the form that costs least where they run.

Shape letters: T tokens, N outputs, K inputs, D width that is normed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels import step
from pregate.kernels.cpu.packed import PackedFFN, Product, product_of


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


class Norm:
    """A norm by its module."""

    def __init__(self, module: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(x)

    def after(self, x_TD: torch.Tensor, more_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + more, which may be written over `x_TD`, and its norm."""
        x_TD = x_TD + more_TD
        return x_TD, self(x_TD)

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module) -> Norm:
        """`module` as an `RMSNorm` where that is what it computes, with its weight or 1 + its weight; else itself."""
        weight = getattr(module, "weight", None)
        eps = next((v for n in ("variance_epsilon", "eps") if isinstance(v := getattr(module, n, None), float)), None)
        if not isinstance(weight, torch.Tensor) or eps is None:
            return Norm(module)
        x = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
        expected = module(x)
        for candidate_D in (weight, 1 + weight.float(), (1 + weight.float()).to(weight)):
            candidate = RMSNorm(candidate_D, eps, x.dtype)
            found = candidate(x)
            if found.dtype == x.dtype and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return candidate
        return Norm(module)


class RMSNorm(Norm):
    """x / rms(x) * weight, over the last axis, of rows in `dtype`; by the CPU's kernels where both are in fp32."""

    def __init__(self, weight_D: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        self.weight_D, self.eps = weight_D.detach().clone(), eps
        self.size = tuple(weight_D.shape)
        self._kernels = step.step_kernels(weight_D.device, dtype) if weight_D.dtype == dtype else None
        self._array = None if self._kernels is None else self.weight_D.numpy()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is None:
            return F.rms_norm(x, self.size, self.weight_D, self.eps)
        x_TD = x.reshape(-1, *self.size)
        out_TD = torch.empty(x_TD.shape)
        self._kernels.rms_norm(x_TD.numpy(), self._array, self.eps, out_TD.numpy())
        return out_TD.view(x.shape)

    def after(self, x_TD: torch.Tensor, more_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kernels is None:
            return super().after(x_TD, more_TD)
        out_TD = torch.empty(x_TD.shape)
        self._kernels.add_rms_norm(x_TD.numpy(), more_TD.numpy(), self._array, self.eps, out_TD.numpy())
        return x_TD, out_TD
