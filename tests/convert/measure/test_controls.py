from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pregate.convert.measure.controls import AllPolicy, OraclePolicy, RandomPolicy
from pregate.model import RoutedForCausalLM
from pregate.model.layers import RoutedMLP, by_token_power, contribution_mass, weighted_mass


@pytest.fixture(scope="module")
def mlp(tiny_layerwise_checkpoint: Path) -> RoutedMLP:
    return RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint, dtype=torch.float32).routed_mlps[1]


def test_random_is_uniform_and_seeded(mlp: RoutedMLP):
    x = torch.zeros(3000, 64)
    first, weights = RandomPolicy(0).choose(mlp, x)
    assert weights is None
    assert torch.equal(first, RandomPolicy(0).choose(mlp, x)[0])
    assert not torch.equal(first, RandomPolicy(1).choose(mlp, x)[0])
    assert (first[:, 0] < first[:, 1]).all()
    counts = torch.bincount(first.flatten(), minlength=6)
    assert (counts > 850).all()  # 1000 expected, standard deviation 26
    assert (counts < 1150).all()


@torch.no_grad()
def test_oracle_takes_the_greatest_masses(mlp: RoutedMLP):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    mass = contribution_mass(mlp, x)
    ids = OraclePolicy(fixed_number=True).choose(mlp, x).ids
    chosen = mass.gather(1, ids)
    others = mass.scatter(1, ids, -torch.inf)
    assert (chosen.min(dim=1).values >= others.max(dim=1).values).all()
    by_mass = OraclePolicy().choose(mlp, x).ids
    assert [[i for i in row if i >= 0] for row in by_mass.tolist()] == [
        [i for i, m in enumerate(row) if m >= mlp.mass_threshold] for row in weighted_mass(mlp, x).tolist()
    ]
    assert 0 < int((by_mass >= 0).sum()) != ids.numel()  # else the two could not be told apart


@torch.no_grad()
def test_mass_by_its_definition(mlp: RoutedMLP):
    assert mlp.experts is not None
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    gate, up = mlp.experts.gate_up_proj[4].chunk(2)
    down = mlp.experts.down_proj[4]
    hidden = torch.nn.functional.silu(x[0] @ gate.T) * (x[0] @ up.T)
    expected = sum(abs(float(h)) * float(down[:, i].norm()) for i, h in enumerate(hidden))
    assert contribution_mass(mlp, x)[0, 4].item() == pytest.approx(expected, rel=1e-5)


def test_all_takes_every_expert(mlp: RoutedMLP):
    assert AllPolicy().choose(mlp, torch.zeros(2, 64))[0].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_weighted_mass_takes_a_power_of_the_tokens_sum_out():
    mass = torch.tensor([[1.0, 3.0], [16.0, 0.0], [0.0, 0.0]])
    total = mass.sum(dim=1, keepdim=True)
    assert by_token_power(mass, total, 0.0) is mass
    assert by_token_power(mass, total, 0.5).tolist() == [[0.5, 1.5], [4.0, 0.0], [0.0, 0.0]]
    assert by_token_power(mass, total, 1.0).tolist() == [[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]]
