"""The fast path inside the in-process model: its layers through the kernels' entry point.

Loaded by name, and only when `experts_implementation=` asks for it: without it the model is an independent oracle.

Shape letters: T tokens, L layers, K experts per token, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from pregate.kernels import expert_ffn
from pregate.model.layers import PathPolicy, RoutedMLP, RoutingPolicy


class FastExperts:
    """Every layer's experts as the chosen implementation holds them, made once from the model's weights.

    Weights that change afterwards are not seen, and an implementation that packs, pads or transposes holds a second
    copy beside the model's own. Half precision is computed in float32 on a CPU without native instructions for it.
    UserError where `implementation` is unknown or cannot run.
    """

    def __init__(self, implementation: str, mlps: list[RoutedMLP], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        widths = {mlps[0].hidden_size, *(mlp.cut.expert_width for mlp in mlps)}
        self._compute_dtype = expert_ffn.compute_dtype(dtype, device)
        self._ffn = expert_ffn.choose(
            implementation,
            device,
            self._compute_dtype,
            act=mlps[0].act_name,
            widths=widths,
            fits_fp16=lambda: dtype in (torch.bfloat16, torch.float16),
            stored=dtype,
        )
        self._units = {}
        for mlp in mlps:
            if mlp.experts is not None:
                shared = None if mlp.shared is None else (mlp.shared.gate_up_proj, mlp.shared.down_proj)
                routed = mlp.experts.gate_up_proj, mlp.experts.down_proj
                self._units[mlp.layer] = self._ffn.units(shared, mlp.cut.num_shared, *routed)
        self._shared = {
            mlp.layer: self._ffn.stack(mlp.shared.gate_up_proj[None], mlp.shared.down_proj[None])
            for mlp in mlps
            if mlp.shared is not None and mlp.layer not in self._units
        }
        self._sizes = {mlp.layer: (mlp.cut.num_routed, mlp.cut.num_shared) for mlp in mlps if mlp.layer in self._units}
        self._planned: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return self._ffn.name

    def begin(self, policy: RoutingPolicy) -> None:
        """Start a forward pass. With paths known now, all layers' segments are made now."""
        self._planned = {}
        if isinstance(policy, PathPolicy):
            self._planned = expert_ffn.layer_segments(self._ffn, self._sizes, policy.ids_TLK, policy.weights_TLK)

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: what `mlp` computes of `x_TD`."""
        if mlp.layer in self._shared:
            return self._ffn.dense(x_TD.to(self._compute_dtype), self._shared[mlp.layer]).to(x_TD.dtype)
        if mlp.layer not in self._units:
            return torch.zeros_like(x_TD)
        segment = self._planned.get(mlp.layer)
        if segment is None:
            ids_TK, weights_TK = mlp.policy.choose(mlp, x_TD)
            weights_T1K = None if weights_TK is None else weights_TK[:, None]
            segment = self._ffn.segments(ids_TK[:, None], *self._sizes[mlp.layer], weights_T1K).layer(0)
        return self._ffn.layer(x_TD.to(self._compute_dtype), segment, self._units[mlp.layer]).to(x_TD.dtype)
