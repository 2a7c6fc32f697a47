"""Experts that share rows train as the masked dense FFN does, and stay equal in what they share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from pregate.convert.domains.tied_rows import tied_rows
from pregate.convert.measure.overlap import rows_are_tied
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.layers import PathPolicy, RoutedMLP

WIDTH, HIDDEN = 12, 8
SHARED, EXPERTS = [1, 8], [[0, 2, 3, 6], [2, 3, 4, 5], [0, 3, 7, 9]]
IDS_T = torch.tensor([0, 1, 2, 1, 0, 2, 2])


@pytest.fixture
def dense() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate and up [12, 8], down [8, 12]; channels 10 and 11 are in no expert."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
    return gate, up, torch.randn(HIDDEN, WIDTH, generator=generator)


@pytest.fixture
def mlp(dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> RoutedMLP:
    gate, up, down = dense
    parent = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=2, intermediate_size=WIDTH)
    mlp = RoutedMLP(0, HIDDEN, LayerCut(3, 1, 1, 4), RoutedConfig(parent), hold_experts=True)
    # The shared part is as wide as an expert; two of its rows are zero, so that they change nothing.
    shared = torch.tensor(SHARED)
    assert mlp.shared is not None
    assert mlp.experts is not None
    for part, rows in enumerate((gate[shared], up[shared])):
        mlp.shared.gate_up_proj.data[4 * part : 4 * part + 2] = rows
    mlp.shared.down_proj.data[:, :2] = down[:, shared]
    ids = torch.tensor(EXPERTS)
    mlp.neuron_index.copy_(torch.cat([shared, torch.tensor([10, 11]), ids.flatten()]))
    mlp.experts.gate_up_proj.data = torch.cat([gate[ids], up[ids]], dim=1)
    mlp.experts.down_proj.data = down[:, ids].movedim(0, 1).contiguous()
    mlp.policy = PathPolicy(IDS_T[:, None, None])
    return mlp


def _names(mlp: RoutedMLP) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in mlp.named_parameters()}


def test_nothing_changes_but_what_is_trained(mlp: RoutedMLP):
    x_TD = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    names, before, state = _names(mlp), mlp(x_TD), {n: t.clone() for n, t in mlp.state_dict().items()}
    with tied_rows([mlp]):
        assert torch.equal(mlp(x_TD), before)
        held = _names(mlp)
        assert held["experts.parametrizations.gate_up_proj.original"] == (8, 2, HIDDEN)  # 8 distinct rows of 12
        assert held["experts.parametrizations.down_proj.original"] == (8, HIDDEN)
    assert _names(mlp) == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items())
    assert all(isinstance(p, torch.nn.Parameter) and p.is_leaf and p.requires_grad for p in mlp.parameters())


def test_a_step_is_that_of_the_masked_dense_ffn(mlp: RoutedMLP, dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """As the released code trains: the whole FFN, each token's 0/1 mask on its intermediate vector."""
    x_TD = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    goal_TD = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    gate, up, down = (t.clone().requires_grad_() for t in dense)
    mask_RI = torch.zeros(3, WIDTH)
    for row, channels in zip(mask_RI, EXPERTS, strict=True):
        row[SHARED + channels] = 1
    out_TD = (F.silu(x_TD @ gate.T) * (x_TD @ up.T) * mask_RI[IDS_T]) @ down.T
    F.mse_loss(out_TD, goal_TD).backward()
    with tied_rows([mlp]):
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
        F.mse_loss(mlp(x_TD), goal_TD).backward()
        optimizer.step()
    assert mlp.experts is not None
    learned = [t.detach() - 0.5 * t.grad for t in (gate, up, down) if t.grad is not None]
    ids = torch.tensor(EXPERTS)
    expected = torch.cat([learned[0][ids], learned[1][ids]], dim=1)
    assert (mlp.experts.gate_up_proj - torch.cat([dense[0][ids], dense[1][ids]], dim=1)).abs().max() > 1e-3
    torch.testing.assert_close(mlp.experts.gate_up_proj.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mlp.experts.down_proj.detach(), learned[2][:, ids].movedim(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_shared_rows_stay_equal_only_when_tied(mlp: RoutedMLP, tied: bool):
    x_TD = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    with tied_rows([mlp] if tied else []):
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.1)
        for _ in range(3):
            mlp(x_TD).square().mean().backward()
            optimizer.step()
    assert mlp.experts is not None
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    # Channel 3 is row 2 of expert 0 and row 1 of experts 1 and 2.
    copies = [torch.cat([gate_up[e, row], gate_up[e, 4 + row], down[e, :, row]]) for e, row in ((0, 2), (1, 1), (2, 1))]
    assert all(torch.equal(copy, copies[0]) for copy in copies) == tied


def test_it_ends_as_it_began_when_training_fails(mlp: RoutedMLP):
    names = _names(mlp)
    with pytest.raises(ZeroDivisionError), tied_rows([mlp]):
        _ = 1 / 0
    assert _names(mlp) == names


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_rows_are_tied_until_one_copy_differs(mlp: RoutedMLP, name: str):
    assert rows_are_tied(mlp)
    weight = getattr(mlp.experts, name).data
    weight[0, 0, 0] += 1e-6  # neuron 0's gate row, or its down column, which expert 2 has too
    assert not rows_are_tied(mlp)
    weight[2, 0, 0] = weight[0, 0, 0]
    assert rows_are_tied(mlp)
    weight[2, :, 3] += 1e-6 if name == "down_proj" else 0  # neuron 9 is no other expert's
    assert rows_are_tied(mlp)
