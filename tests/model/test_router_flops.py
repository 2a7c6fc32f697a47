"""What a path router costs, against torch's own count and against a 7B backbone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_router import PathRouter
from pregate.model.router_flops import MAX_SHARE, backbone_flops, router_flops

LLAMA_7B = [LayerCut(7, 1, 3, 1376)] * 32


@pytest.mark.parametrize("heads", ["independent", "recurrent", "single"])
@pytest.mark.parametrize("gate", ["scores", "dselect"])
@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_the_count_is_torchs_own(heads: str, gate: str, selection: str):
    config = PathRouterConfig(16, 2, 4, 12, heads, gate)
    cuts = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(5, 3, 3, 8)]
    router = PathRouter(config, 100, cuts, selection)
    num_past, past = 11, [(torch.zeros(1, 11, 16), torch.zeros(1, 11, 16))] * 2
    with FlopCounterMode(display=False) as counter:
        router(torch.tensor([[7]]), past, torch.tensor([num_past]))
    assert counter.get_total_flops() == router_flops(config, cuts, selection)


def test_the_default_costs_at_most_one_percent_of_a_7b_llama():
    backbone = backbone_flops(6_700_000_000)
    assert router_flops(PathRouterConfig(), LLAMA_7B) <= MAX_SHARE * backbone
    assert router_flops(PathRouterConfig(dim=2048, num_blocks=2), LLAMA_7B) > MAX_SHARE * backbone
    assert router_flops(PathRouterConfig(), [LayerCut(8, 0, 4, 1)] * 32) == 491_520
