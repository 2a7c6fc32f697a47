"""Binary codes that name experts: by hand, and what the choice among scores must keep."""

import torch

from pregate.kernels.reference import above, top_k
from pregate.model.config import LayerCut
from pregate.model.dselect import code_scores, code_shape, code_signs, num_logits


def test_selectors_bits_and_codes_by_hand():
    fixed = [code_shape(LayerCut(n, 0, min(n, 2), 1), "top_k") for n in (1, 2, 3, 4, 5, 8, 9)]
    assert fixed == [(1, 1), (2, 1), (2, 2), (2, 2), (2, 3), (2, 3), (2, 4)]
    varying = [code_shape(LayerCut(n, 0, min(n, 2), 1), "threshold") for n in (1, 2, 3, 4, 5, 8, 9)]
    assert varying == [(1, 1), (2, 2), (3, 2), (4, 3), (4, 3), (4, 4), (4, 4)]  # a code more
    assert [num_logits(LayerCut(*c, 1), "top_k") for c in ((5, 3, 3), (0, 1, 0), (7, 1, 2))] == [9, 0, 6]
    assert [num_logits(LayerCut(*c, 1), "threshold") for c in ((5, 3, 3), (0, 1, 0), (7, 1, 0))] == [15, 0, 0]
    assert code_signs(3, 2, torch.zeros(1)).tolist() == [[-1, -1], [1, -1], [-1, 1]]


def test_scores_by_hand():
    assert code_scores(torch.tensor([2.0, -1.0]), [LayerCut(4, 0, 1, 1)], "top_k").tolist() == [-2, 1, -2, -1]
    # Two selectors: the first names expert 1 as above, the second, [-3, 4], expert 2, by at least 3.
    both = code_scores(torch.tensor([[2.0, -1.0, -3.0, 4.0]]), [LayerCut(4, 0, 2, 1)], "top_k")
    assert both.tolist() == [[-2, 1, 3, -1]]
    # A layer with nothing to choose, beside one of 3 experts whose selector's code, [1, 1], names none of them.
    cuts = [LayerCut(2, 0, 0, 1), LayerCut(3, 0, 1, 1)]
    assert code_scores(torch.tensor([1.0, 2.0]), cuts, "top_k").tolist() == [0, 0, -2, -2, -1]


def test_what_the_selectors_name_is_chosen_first():
    cut = LayerCut(5, 0, 3, 1)
    logits = torch.randn(500, num_logits(cut, "top_k"), generator=torch.Generator().manual_seed(0))
    chosen_TK = top_k(code_scores(logits, [cut], "top_k"), 3)
    codes_TK = ((logits.unflatten(-1, (3, 3)) > 0) * torch.tensor([1, 2, 4])).sum(-1)
    named = [set(row) & set(range(5)) for row in codes_TK.tolist()]
    assert all(names <= set(row) for names, row in zip(named, chosen_TK.tolist(), strict=True))
    assert {len(names) for names in named} == {0, 1, 2, 3}


def test_with_threshold_0_what_is_named_and_nothing_else_is_chosen():
    cut = LayerCut(4, 0, 2, 1)
    logits = torch.randn(500, num_logits(cut, "threshold"), generator=torch.Generator().manual_seed(0))
    chosen_TR = above(code_scores(logits, [cut], "threshold"), torch.zeros(()))
    codes_TK = ((logits.unflatten(-1, (4, 3)) > 0) * torch.tensor([1, 2, 4])).sum(-1)
    named = [set(row) & set(range(4)) for row in codes_TK.tolist()]
    assert [set(row) - {-1} for row in chosen_TR.tolist()] == named
    assert {len(names) for names in named} == {0, 1, 2, 3, 4}
