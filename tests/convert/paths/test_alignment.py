"""Renumbered experts: what the model computes stays, and equal numbers go together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pregate.convert.files.streamed import load_any
from pregate.convert.measure.controls import RandomPolicy
from pregate.convert.paths.alignment import align_experts, aligned_orders, renumber
from pregate.convert.paths.targets import collect_targets
from pregate.convert.progress import QUIET
from pregate.model.folder import read_folder
from pregate.model.layers import GatePolicy


def test_shuffled_numbers_are_found_again():
    generator = np.random.default_rng()
    common_TR = torch.from_numpy(generator.standard_normal((400, 6)))
    shuffles = [generator.permutation(6) for _ in range(5)]
    noise = [torch.from_numpy(generator.standard_normal((400, 6))) for _ in shuffles]
    # Number r of layer l is what is common to all layers at shuffle[r].
    target_TS = torch.cat([common_TR[:, s] + 0.5 * n for s, n in zip(shuffles, noise, strict=True)], dim=1)
    orders = aligned_orders(target_TS, 5)
    found = [shuffle[order] for shuffle, order in zip(shuffles, orders, strict=True)]
    assert all((f == found[0]).all() for f in found)


def test_the_example_and_uneven_layers():
    target_TS = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0], [1.0, 0.2, 0.1, 1.0]])
    first, second = aligned_orders(target_TS, 2).tolist()
    assert [second.index(first[0]), second.index(first[1])] == [1, 0]
    with pytest.raises(ValueError, match="every layer needs as many"):
        aligned_orders(target_TS, 3)


def test_a_renumbered_model_computes_the_same(tiny_layerwise_checkpoint: Path):
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    before, after = load_any(read_folder(tiny_layerwise_checkpoint)), load_any(read_folder(tiny_layerwise_checkpoint))
    order = np.roll(np.arange(before.config.cuts[0].num_routed), 2)
    for mlp in after.routed_mlps:
        renumber(mlp, order)
    with torch.no_grad():
        for policy in (None, GatePolicy("paper_gate")):
            before.routing_policy = after.routing_policy = policy
            torch.testing.assert_close(after(ids).logits, before(ids).logits, atol=1e-4, rtol=0)
        before.routing_policy, after.routing_policy = RandomPolicy(0), RandomPolicy(0)
        assert (after(ids).logits - before(ids).logits).abs().max() > 1e-3  # numbers did change


def test_aligned_masses_are_those_of_the_renumbered_model(tiny_layerwise_checkpoint: Path):
    model = load_any(read_folder(tiny_layerwise_checkpoint))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 200, (30,), generator=generator).tolist() for _ in range(25)]
    before = collect_targets(model, rows, QUIET)
    after = align_experts(model, before)
    again = collect_targets(model, rows, QUIET)
    assert any((a != b).any() for a, b in zip(after.mass, before.mass, strict=True))  # something was renumbered
    for moved, seen in zip(after.mass, again.mass, strict=True):
        torch.testing.assert_close(moved, seen, atol=1e-5, rtol=1e-4)
