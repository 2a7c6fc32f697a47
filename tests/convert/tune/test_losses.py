from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pregate.convert.tune.losses import CHUNK_POSITIONS, mixed_loss, next_tokens


def test_by_hand():
    logits = torch.zeros(2, 4, requires_grad=True)
    loss, sums = mixed_loss(logits, torch.tensor([2, -100]), None, 0.0, 1)
    assert loss.item() == pytest.approx(math.log(4))
    assert sums.tolist() == [pytest.approx(math.log(4)), 0.0]
    loss.backward()
    assert logits.grad.tolist() == [[0.25, 0.25, -0.75, 0.25], [0.0, 0.0, 0.0, 0.0]]


def test_next_tokens_by_hand():
    ids, mask = torch.tensor([[1, 5, 6], [1, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert next_tokens(ids, mask).tolist() == [5, 6, -100, 7, -100, -100]


@pytest.mark.parametrize("kl_share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_torch(kl_share: float):
    """Over more positions than are computed at a time, some of them not scored."""
    generator = torch.Generator().manual_seed(0)
    num = CHUNK_POSITIONS + 40
    logits, teacher = (3 * torch.randn(num, 50, generator=generator) for _ in range(2))
    targets = torch.randint(0, 50, (num,), generator=generator)
    targets[::3] = -100
    ours, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    loss, sums = mixed_loss(ours, targets, teacher if kl_share else None, kl_share, 77)
    kept = targets >= 0
    cross_entropy = F.cross_entropy(theirs[kept], targets[kept], reduction="sum")
    log_q, log_p = theirs[kept].log_softmax(-1), teacher[kept].log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    expected = ((1 - kl_share) * cross_entropy + kl_share * kl) / 77
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert sums[0].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert sums[1].item() == pytest.approx(kl.item() if kl_share else 0.0, rel=1e-4)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    loss, _ = mixed_loss(logits, torch.arange(5), logits.detach().clone(), 1.0, 5)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert logits.grad.abs().max() < 1e-7
