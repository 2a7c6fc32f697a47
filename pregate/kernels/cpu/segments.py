"""What the CPU implementations read of a step's choices: lists and few tensors, for all layers in one pass.

Shape letters: T tokens, L layers, K experts per token, R routed experts, P rows (token, expert) of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class CpuSegment:
    """One layer: `counts[i]` rows, at least one, go to routed unit `units[i]`, in ascending unit order.

    `tokens` int64 [P]: the token of each row, by unit, within a unit by token; None where every unit here has all
    tokens' rows, and weighs 1. `weights` fp32 [P, 1] or None when all are 1.
    """

    num_tokens: int
    num_units: int
    units: list[int]
    counts: list[int]
    tokens: torch.Tensor | None
    weights: torch.Tensor | None


class CpuSegments:
    """All layers of a step.

    Example: T = 3, L = 1, ids [[0, 1], [1, -1], [-1, 0]], 2 routed: units [0, 1], counts [2, 2], tokens [0, 2, 0, 1].
    """

    def __init__(self, ids_TLK: torch.Tensor, num_routed: int, weights_TLK: torch.Tensor | None = None) -> None:
        ids_LTK = ids_TLK.numpy().transpose(1, 0, 2)
        num_layers, num_tokens, num_k = ids_LTK.shape
        if ids_LTK.size and (ids_LTK.min() < -1 or ids_LTK.max() >= num_routed):
            raise ValueError(f"expert ids must lie in [-1, {num_routed}), got {ids_LTK.min()} to {ids_LTK.max()}")
        # 16-bit keys make NumPy's stable sort a radix sort; what is no expert comes last.
        keys_LP = np.where(ids_LTK < 0, num_routed, ids_LTK).astype(np.int16).reshape(num_layers, -1)
        flat = (keys_LP + np.arange(num_layers)[:, None] * (num_routed + 1)).reshape(-1)
        counts_LR = np.bincount(flat, minlength=num_layers * (num_routed + 1)).reshape(num_layers, -1)[:, :num_routed]
        used_LR = counts_LR > 0
        all_units, all_counts = np.nonzero(used_LR)[1].tolist(), counts_LR[used_LR].tolist()
        stops = np.cumsum(used_LR.sum(axis=1)).tolist()
        tokens, weights = [None] * num_layers, [None] * num_layers
        whole_L = [False] * num_layers
        if weights_TLK is None:
            whole_L = ((counts_LR == num_tokens) | ~used_LR).all(axis=1).tolist()
        if not all(whole_L):
            order_LP = np.argsort(keys_LP, axis=1, kind="stable")
            rows_L = counts_LR.sum(axis=1)
            real_LP = np.arange(keys_LP.shape[1]) < rows_L[:, None]
            tokens = torch.from_numpy((order_LP // max(num_k, 1))[real_LP]).split(rows_L.tolist())
            if weights_TLK is not None:
                weights_LP = weights_TLK.to(torch.float32).transpose(0, 1).reshape(num_layers, -1)
                by_row = weights_LP.gather(1, torch.from_numpy(order_LP))[torch.from_numpy(real_LP)]
                weights = by_row[:, None].split(rows_L.tolist())
        self._layers, start = [], 0
        for layer, stop in enumerate(stops):
            named = all_units[start:stop], all_counts[start:stop]
            rows = None if whole_L[layer] else tokens[layer]
            self._layers.append(CpuSegment(num_tokens, num_routed, *named, rows, weights[layer]))
            start = stop

    def layer(self, layer: int) -> CpuSegment:
        return self._layers[layer]
