"""A layer as one masked FFN gives each token the sum over its own units, whatever the others compute."""

import numpy as np
import pytest
import torch

from pregate.kernels import reference
from pregate.kernels.cpu.whole import WholeLayer, absent, spread
from tests.kernels.cpu.test_ffn import D, M, random_experts

R, S, T = 5, 2, 6
IDS = np.array([[[0, 2, -1]], [[4, 1, 3]], [[-1, -1, -1]], [[2, -1, -1]], [[3, 0, 1]], [[1, 4, -1]]], dtype=np.int16)


def expected(x_TD, shared, routed, weights_TLK, act):
    found = torch.zeros(T, D) if shared is None else reference.expert_ffn(x_TD, shared[0], shared[1], act)
    for token, ids in enumerate(IDS[:, 0].tolist()):
        for place, expert in enumerate(ids):
            if expert >= 0:
                y_D = reference.expert_ffn(x_TD[token, None], routed[0][expert], routed[1][expert], act)[0]
                found[token] += y_D if weights_TLK is None else y_D * float(weights_TLK[token, 0, place])
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_each_token_gets_the_sum_over_its_own_units(act, with_shared, weighted):
    gate_up, down = random_experts(1, S * M, seed=3)
    shared, routed = (gate_up[0], down[0]) if with_shared else None, random_experts(R)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    weights = np.random.default_rng(2).uniform(0.2, 3, size=IDS.shape).astype(np.float32) if weighted else None
    spread_TR = None if weights is None else spread(IDS, weights, R, torch.float32)[0]
    found = WholeLayer(act, shared, routed, torch.float32).run(x_TD, absent(IDS, R)[0], spread_TR)
    wanted = expected(x_TD, shared, routed, weights, reference.activation(act))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1


def test_what_overflows_in_an_expert_that_was_not_chosen_is_not_seen():
    gate_up, down = random_experts(R)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    whole = WholeLayer("silu", None, (gate_up, down), torch.float32)
    wanted = whole.run(x_TD, absent(IDS, R)[0], None)
    gate_up[4] *= 1e30
    found = WholeLayer("silu", None, (gate_up, down), torch.float32).run(x_TD, absent(IDS, R)[0], None)
    others = [0, 2, 3, 4]  # tokens 1 and 5 have chosen expert 4
    assert torch.equal(found[others], wanted[others])
    assert not found[1].isfinite().all()


def test_it_pays_where_most_experts_run_anyway():
    assert WholeLayer.max_rows(3, 3, 5) == 32
    assert WholeLayer.max_rows(1, 1, 7) == 0
    assert "gain nothing" in WholeLayer.why_not(4096, 4096, torch.float32)
