"""The mean active share is held on text that thresholds were not set on, by what came before alone."""

import torch

from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_computer import PathComputer
from pregate.model.path_router import PathRouter, choose_experts, margins, put_thresholds
from pregate.model.share_control import GAIN, PRIOR_TOKENS, SHARES, ShareControl

CUTS = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(4, 1, 4, 8), LayerCut(7, 1, 2, 8)]
CHOOSES = [0, 3]


def held_router() -> PathRouter:
    torch.manual_seed(0)
    router = PathRouter(PathRouterConfig(16, 1, 4, 12, hold_share=True), 100, CUTS, "threshold")
    put_thresholds(router, torch.randn(4000, 16), [c.num_active for c in CUTS])
    return router


def mean_chosen(router: PathRouter, scores_TS: torch.Tensor) -> float:
    """Experts of a token in the layers that have a choice, the thresholds following the text."""
    control = router.share_control
    assert control is not None
    counts = control.counts(margins(router, scores_TS))
    seen = torch.cat([torch.zeros_like(counts[:1]), counts.cumsum(dim=0)[:-1]])
    ids = choose_experts(router, scores_TS, control.offset(seen)).ids[:, CHOOSES]
    return float((ids >= 0).sum()) / len(ids)


def test_the_share_asked_for_is_held_where_a_text_scores_higher_or_lower():
    router, generator = held_router(), torch.Generator().manual_seed(1)
    for shift, spread in [(0.3, 1.0), (-0.3, 1.0), (0.0, 1.4), (0.2, 0.8)]:
        scores = (torch.randn(600, 16, generator=generator) * spread + shift).double()
        fixed = float((choose_experts(router, scores).ids[:, CHOOSES] >= 0).sum()) / 600
        assert abs(fixed - 5) > 0.2, "this text would have needed no control"
        assert abs(mean_chosen(router, scores) - 5) < 0.05 + abs(fixed - 5) / 3


def test_on_the_text_it_was_set_on_thresholds_stay_about_where_they_are():
    router = held_router()
    torch.manual_seed(0)
    assert abs(mean_chosen(router, torch.randn(4000, 16).double()) - 5) < 0.05


def test_offsets_of_a_worked_example():
    """Means 4, 5, 6, ... experts at offsets 0, 1, 2, ...; 8 are wanted; 16 tokens of each are thought to go before."""
    control = ShareControl()
    control.means.copy_(torch.arange(len(SHARES)) + 4)
    control.wanted.fill_(8)
    none = torch.zeros(1, len(SHARES) + 1, dtype=torch.int64)
    assert control.offset(none).tolist() == [4.0]
    one_lower = torch.cat([torch.arange(len(SHARES)) + 3, torch.ones(1)])[None].long() * PRIOR_TOKENS
    one_lower[:, -1] = (
        PRIOR_TOKENS  # as many tokens again, each one expert short: half a step more, and what was missed
    )
    torch.testing.assert_close(control.offset(one_lower), torch.tensor([4.0 + GAIN / 2], dtype=torch.float64))
    far = torch.zeros(1, len(SHARES) + 1, dtype=torch.int64)
    far[:, -1] = 10**6  # no expert at all, whatever the offset: the outermost
    assert control.offset(far).tolist() == [len(SHARES) - 1]


def test_without_it_a_state_has_no_counts():
    computer = PathComputer(PathRouter(PathRouterConfig(16, 1, 4, 12), 100, CUTS, "threshold"))
    assert computer.num_counts == 0 and computer.new_state().counts.shape == (0,)
