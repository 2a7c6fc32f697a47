"""What Read-ME's router is distilled from: how well each domain expert would serve a token of the dense model.

Data on its way: documents -> the dense model -> per layer h [T, I], the input of its down projection -> what of it an
expert holds [T, R] -> all layers side by side [T, S], the form in which `paths/training.py` takes its targets.

Shape letters: T tokens, I channels, R routed experts of a layer, S those of all layers, W channels a token runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pregate.convert.domains.domains import down_projections, run_layers, watched
from pregate.convert.paths.targets import TargetPool, by_row
from pregate.convert.progress import Progress
from pregate.model.gated_mlp import find_gated_mlps


def expert_masks(experts_RM: Sequence[np.ndarray], widths: Sequence[int]) -> list[torch.Tensor]:
    """Per layer 1 where an expert holds a channel that not all of them hold, and 0: float32 [I, R].

    What all hold tells nothing between them (the released code's masks are without it too).
    """
    masks = []
    for ids_RM, width in zip(experts_RM, widths, strict=True):
        mask_IR = torch.zeros(width, len(ids_RM))
        mask_IR.scatter_(0, torch.from_numpy(ids_RM.T.astype(np.int64)), 1.0)
        mask_IR[mask_IR.all(dim=1)] = 0
        masks.append(mask_IR)
    return masks


def overlap_scores(h_TI: torch.Tensor, mask_IR: torch.Tensor, num_active: int) -> torch.Tensor:
    """[T, R]: how many of a token's `num_active` channels of greatest magnitude (M_0, section 3.2) each expert holds.

    The released code counts five nested cut-offs, on signed values; the paper's text has this one, on magnitudes.

    Example: h [3, -4, 1, 0], 2 active, experts [0, 1] and [1, 2]: [2, 1].
    """
    chosen_TW = h_TI.abs().topk(num_active, dim=-1).indices
    return torch.zeros_like(h_TI).scatter_(1, chosen_TW, 1.0) @ mask_IR


def contribution_scores(h_TI: torch.Tensor, mask_IR: torch.Tensor, norm_I: torch.Tensor) -> torch.Tensor:
    """[T, R]: the sum of |h_i| times the norm of down column i over each expert's channels."""
    return (h_TI.abs() * norm_I) @ mask_IR


@torch.no_grad()
def domain_targets(
    model: Any,
    rows: Sequence[list[int]],
    masks: Sequence[torch.Tensor],
    num_active: Sequence[int],
    target: str,
    progress: Progress,
) -> TargetPool:
    """Run a dense `model` over `rows` and keep every expert's score at every token, by `target` (`ReadMeOptions`).

    `masks` as by `expert_masks`; `num_active` W of each layer.
    """
    mlps = find_gated_mlps(model)
    masks = [mask_IR.to(mlp.down) for mask_IR, mlp in zip(masks, mlps, strict=True)]
    norms = [mlp.down.norm(dim=0) for mlp in mlps]
    parts: dict[int, torch.Tensor] = {}

    def see(layer: int, h_TI: torch.Tensor) -> None:
        if target == "overlap":
            scores_TR = overlap_scores(h_TI, masks[layer], num_active[layer])
        else:
            scores_TR = contribution_scores(h_TI, masks[layer], norms[layer])
        parts[layer] = scores_TR.cpu()

    def run(ids_BN: torch.Tensor) -> torch.Tensor:
        run_layers(model, ids_BN)
        return torch.cat([parts[layer] for layer in range(len(mlps))], dim=-1)

    with watched(down_projections(mlps), see):
        scores = by_row(rows, progress, run)
    num_layers = len(mlps)
    return TargetPool(list(rows), scores, (torch.tensor(torch.inf),) * num_layers, (1.0,) * num_layers)
