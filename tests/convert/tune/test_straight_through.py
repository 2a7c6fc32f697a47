from __future__ import annotations

import pytest
import torch

from pregate.convert.tune.straight_through import soft_choice, straight_through
from pregate.kernels.reference import above, chosen_by, top_k


def test_the_choice_is_that_of_the_reference():
    scores = torch.randint(0, 4, (200, 6), generator=torch.Generator().manual_seed(0)).float()  # many ties
    for chosen, ids in (
        (chosen_by(scores, 2, None), top_k(scores, 2)),
        (chosen_by(scores, 2, torch.tensor(2.0)), above(scores, torch.tensor(2.0))),
    ):
        expected = torch.zeros(200, 7, dtype=torch.bool).scatter_(1, ids % 7, True)[:, :6]  # -1 falls in column 6
        assert torch.equal(chosen, expected)


def test_forward_is_the_hard_choice_and_backward_the_soft_ones_by_hand():
    """Scores -1 and 1 have spread 1; softmax is 0.1192 and 0.8808, its derivative +-0.8808 * 0.1192 = 0.1050."""
    scores = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    weights = straight_through(scores, torch.tensor([[False, True]]), 1)
    assert weights.tolist() == [[0.0, 1.0]]
    weights[0, 1].backward()
    assert scores.grad.tolist()[0] == pytest.approx([-0.1050, 0.1050], abs=1e-4)


def test_by_threshold_each_expert_has_its_own_gradient_by_hand():
    """At 0.5 above the threshold, in spreads of 1, the sigmoid's derivative is 0.6225 * 0.3775 = 0.2350."""
    scores = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    threshold = torch.tensor(0.5)
    weights = straight_through(scores, chosen_by(scores, 1, threshold), 1, threshold)
    assert weights.tolist() == [[0.0, 1.0]]
    weights.backward(torch.tensor([[0.0, 1.0]]))
    assert scores.grad.tolist()[0] == pytest.approx([0.0, 0.2350], abs=1e-4)


@pytest.mark.parametrize("limit", [-torch.inf, torch.inf])
def test_a_threshold_that_takes_all_or_none_has_no_gradient_and_no_nan(limit: float):
    scores = torch.randn(4, 3, requires_grad=True)
    threshold = torch.tensor(limit)
    weights = straight_through(scores, chosen_by(scores, 1, threshold), 1, threshold)
    assert weights.unique().tolist() == [float(limit < 0)]
    weights.sum().backward()
    assert not scores.grad.any()


def test_without_gradients_nothing_soft_is_computed():
    scores = torch.full((1, 2), torch.nan)  # whatever is soft would be nan
    assert straight_through(scores, torch.tensor([[True, False]]), 1).tolist() == [[1.0, 0.0]]
    assert soft_choice(scores, 1, None).isnan().all()
