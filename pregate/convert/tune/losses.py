"""Cross-entropy and the divergence from a teacher, in one pass over the logits.

Shape letters: P positions (of all rows, one after another), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

#: Positions computed at a time: bounds the float32 copies of the logits.
CHUNK_POSITIONS = 512


class _MixedLoss(torch.autograd.Function):
    """See `mixed_loss`. Both losses have gradients of one form, softmax minus target, so one buffer holds the mixed
    one; autograd of the two would keep four arrays of the logits' size."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: torch.Tensor,
        targets_P: torch.Tensor,
        teacher_PV: torch.Tensor | None,
        kl_share: float,
        num_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_PV = torch.empty_like(logits_PV)
        sums = torch.zeros(2, dtype=torch.float64, device=logits_PV.device)
        for start in range(0, len(targets_P), CHUNK_POSITIONS):
            rows = slice(start, start + CHUNK_POSITIONS)
            teacher = None if teacher_PV is None else teacher_PV[rows]
            sums += _chunk(logits_PV[rows], targets_P[rows], teacher, kl_share, grad_PV[rows])
        grad_PV.div_(num_tokens)
        ctx.save_for_backward(grad_PV)
        ctx.mark_non_differentiable(sums)
        loss = ((1 - kl_share) * sums[0] + kl_share * sums[1]) / num_tokens
        return loss.float(), sums

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_PV,) = ctx.saved_tensors
        return grad_PV * grads[0].to(grad_PV.dtype), None, None, None, None


def _chunk(
    logits_PV: torch.Tensor,
    targets_P: torch.Tensor,
    teacher_PV: torch.Tensor | None,
    kl_share: float,
    grad_PV: torch.Tensor,
) -> torch.Tensor:
    """Write the gradient of the summed loss into `grad_PV`; return the sums of cross-entropy and KL, float64 [2]."""
    scored_P1 = (targets_P >= 0)[:, None]
    targets_P1 = targets_P.clamp_min(0)[:, None]
    log_q_PV = logits_PV.float().log_softmax(dim=-1)
    cross_entropy = -(log_q_PV.gather(1, targets_P1) * scored_P1).double().sum()
    q_PV, kl = log_q_PV.exp(), torch.zeros_like(cross_entropy)
    if teacher_PV is not None:
        log_p_PV = teacher_PV.float().log_softmax(dim=-1)
        p_PV = log_p_PV.exp()
        # Two products of rows, as p (log p - log q) would be another array of the logits' size.
        kl_P = torch.linalg.vecdot(p_PV, log_p_PV) - torch.linalg.vecdot(p_PV, log_q_PV)
        kl = (kl_P * scored_P1[:, 0]).double().sum()
        q_PV.sub_(p_PV, alpha=kl_share)
    q_PV.scatter_add_(1, targets_P1, q_PV.new_full(targets_P1.shape, kl_share - 1))
    grad_PV.copy_(q_PV.mul_(scored_P1))
    return torch.stack([cross_entropy, kl])


def mixed_loss(
    logits_PV: torch.Tensor, targets_P: torch.Tensor, teacher_PV: torch.Tensor | None, kl_share: float, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (1 - s) cross-entropy + s KL(teacher || student), divided by `num_tokens`, and the sums of both.

    `targets_P` int64, below 0 where nothing is scored. Sums are float64 [2], in nats. `kl_share` must be 0 without
    a teacher; with 0 a teacher's KL is reported all the same.

    Example: logits of 0 over a vocabulary of 4, one target, no teacher: loss ln 4, sums [ln 4, 0].
    """
    return _MixedLoss.apply(logits_PV, targets_P, teacher_PV, kl_share, num_tokens)  # pyright: ignore[reportReturnType]


def next_tokens(ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    """The id that follows each position, flat [B * N]; -100 at a row's last position and at padding.

    Example: ids [[1, 5, 6], [1, 7, 0]], mask [[1, 1, 1], [1, 1, 0]]: [5, 6, -100, 7, -100, -100].
    """
    shifted_BN = ids_BN[:, 1:].masked_fill(mask_BN[:, 1:] == 0, -100)
    return F.pad(shifted_BN, (0, 1), value=-100).flatten()
