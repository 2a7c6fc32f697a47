from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pregate.convert.domains.domains import watched
from pregate.convert.domains.targets import contribution_scores, domain_targets, expert_masks, overlap_scores
from pregate.convert.progress import QUIET
from pregate.model.gated_mlp import find_gated_mlps

EXPERTS = np.array([[0, 1, 5], [1, 2, 5], [3, 4, 5]])


def test_masks_leave_out_what_all_experts_hold():
    (mask_IR,) = expert_masks([EXPERTS], [7])
    assert mask_IR.int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_scores_by_hand():
    """Magnitudes count, not values; channel 5, which all experts hold, tells nothing."""
    (mask_IR,) = expert_masks([EXPERTS], [7])
    h_TI = torch.tensor([[3.0, -4.0, 1.0, 0.0, 0.5, 9.0, 0.0], [0.0, 1.0, -2.0, -7.0, 0.0, 0.0, 8.0]])
    assert overlap_scores(h_TI, mask_IR, 3).tolist() == [[2, 1, 0], [0, 1, 1]]
    norms = torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0, 1.0, 1.0])
    assert contribution_scores(h_TI, mask_IR, norms).tolist() == [[11, 9, 2], [2, 4, 7]]


@torch.no_grad()
def test_targets_are_of_the_dense_model_whatever_the_padding(tiny_dense: Path):
    """Two rows of one batch; each layer's scores side by side, from its h computed anew."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    experts = [np.sort(np.stack([rng.permutation(128)[:64] for _ in range(3)]), axis=1) for _ in range(3)]
    masks, rows = expert_masks(experts, [128] * 3), [[1, 7, 9, 11, 13], [1, 44]]
    pool = domain_targets(model, rows, masks, [64] * 3, "overlap", QUIET)
    assert [scores.shape for scores in pool.mass] == [(5, 9), (2, 9)]
    mlps, seen = find_gated_mlps(model), []
    with watched([mlp.module for mlp in mlps], lambda _layer, x_TD: seen.append(x_TD)):
        model(torch.tensor(rows[1:]))
    for layer, (x_TD, mlp) in enumerate(zip(seen, mlps, strict=True)):
        h_TI = (F.silu(x_TD @ mlp.gate.T) * (x_TD @ mlp.up.T)).abs()
        strong = [set(row.topk(64).indices.tolist()) for row in h_TI]
        common = set.intersection(*(set(e) for e in experts[layer].tolist()))
        expected = [[len(s & set(e) - common) for e in experts[layer].tolist()] for s in strong]
        assert pool.mass[1][:, 3 * layer : 3 * layer + 3].tolist() == expected
