"""`SharedExperts`: each layer's shared expert as one wide FFN, through the implementation chosen for this machine.

Shape letters: T tokens, D hidden width, S shared experts of M neurons.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pregate.kernels import expert_ffn
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.cpu.packed import fits_fp16
from pregate.kernels.tools.warm_up import warm_up_dense
from pregate.kernels.units import SharedFFN
from pregate.model.config import RoutedConfig


class SharedExperts:
    """Holds the shared experts it is given, computing on `device` in `dtype`."""

    def __init__(self, config: RoutedConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.hidden_size = int(config.text_config.hidden_size)
        self._ffn: ExpertFFN | None = None
        self._weights: dict[int, Any] = {}
        self._runs: dict[int, SharedFFN] = {}

    def hold(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take a layer's shared expert: `gate_up` [2 S M, D], `down` [D, S M]."""
        if self._ffn is None:
            widths = {self.hidden_size, *(cut.shared_width for cut in self.config.cuts if cut.num_shared)}
            act, fits = self.config.hidden_act, partial(fits_fp16, gate_up)
            self._ffn = expert_ffn.choose("auto", self.device, self.dtype, act=act, widths=widths, fits_fp16=fits)
        self._weights[layer] = weights = self._ffn.stack(gate_up[None], down[None])
        self._runs[layer] = partial(self._ffn.dense, weights=weights)

    def of(self, layer: int) -> SharedFFN | None:
        """What runs a layer's shared expert; None where none is held."""
        return self._runs.get(layer)

    def run(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the first addend of a layer's sum [T, D], zeros without a shared expert."""
        run = self._runs.get(layer)
        return torch.zeros_like(x_TD) if run is None else run(x_TD)

    def row(self) -> torch.Tensor:
        """A row [1, D] as those of a step."""
        return torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def warm_up(self, step_tokens: int) -> None:
        """Compile the kernels of steps of up to `step_tokens` tokens, once per width."""
        of_width = {self.config.cuts[layer].shared_width: weights for layer, weights in self._weights.items()}
        if self._ffn is not None and self._ffn.compiles:
            for weights in of_width.values():
                warm_up_dense(self._ffn, weights, self.row(), step_tokens)
