from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pregate.convert.cut.cmoe import Profile, profile, shared_neurons, split_by_marks
from pregate.kernels.reference import activation
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP


def _mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> GatedMLP:
    return GatedMLP(0, nn.Module(), "mlp", nn.Module(), gate, up, down)


def test_profile_by_hand():
    # Two inputs along the axes, of different length. Neuron 0 looks along axis 0, neuron 1 along axis 1 with large
    # weights, neuron 2 along both with tiny weights. Cosine profiling sees directions only.
    eye = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.01, 0.01]])
    down = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])  # column norms 5, 2, 1
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    seen = profile(x, _mlp(eye, eye, down), activation("relu"), 1)
    assert seen.marks_TK.tolist() == [[0], [1]]
    assert seen.rate_I.tolist() == [0.5, 0.5, 0.0]
    # Raw h = relu(x g) * (x u): neuron 0: 4 and 0; neuron 1: 0 and 100; neuron 2: 0.0004 and 0.0001.
    expected = torch.tensor([2.0 * 5, 50.0 * 2, 0.00025 * 1], dtype=torch.float64)
    assert torch.allclose(seen.contribution_I, expected, rtol=1e-5)


class LargestOutput(TorchDispatchMode):
    """The most bytes that one operation allocates for its result (views allocate none)."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


def test_no_copy_of_a_weight_is_made():
    """On few rows the largest thing made by profiling and by checking is smaller than one weight."""

    class Gated(nn.Module):
        def forward(self, x):
            return nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)

    generator = torch.Generator().manual_seed(0)
    gate, up, x = (torch.randn(n, 64, generator=generator) for n in (96, 96, 5))
    down = torch.randn(64, 96, generator=generator)
    mlp = GatedMLP(0, nn.Module(), "mlp", Gated(), gate, up, down)
    with LargestOutput() as largest:
        profile(x, mlp, activation("silu"), 3)
        mlp.check("silu")
    assert 0 < largest.num_bytes < down.numel() * down.element_size()


def test_profile_against_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(0)
    gate, up, x = (torch.randn(n, 8, generator=generator) for n in (20, 20, 9))
    down = torch.randn(8, 20, generator=generator)
    seen = profile(x, _mlp(gate, up, down), activation("silu"), 3)
    for token, row in enumerate(x):
        unit = row / row.norm()
        scores = [
            abs(float(nn.functional.silu(unit @ g / g.norm()) * (unit @ u / u.norm())))
            for g, u in zip(gate, up, strict=True)
        ]
        best = sorted(range(20), key=lambda n: -scores[n])[:3]
        assert sorted(seen.marks_TK[token].tolist()) == sorted(best)


def test_raw_profiling_sees_lengths():
    eye = torch.tensor([[1.0, 0.0], [0.0, 10.0], [3.0, 3.0]])
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    mlp = _mlp(eye, eye, torch.ones(2, 3))
    # Raw h: token 0: 4, 0, 36; token 1: 0, 100, 9. By direction token 0 would mark neuron 0.
    assert profile(x, mlp, activation("relu"), 1, "raw").marks_TK.tolist() == [[2], [1]]
    assert profile(x, mlp, activation("relu"), 1, "cosine").marks_TK.tolist() == [[0], [1]]


def test_shared_neurons_follow_the_chosen_score():
    marks = torch.tensor([[0, 1], [0, 2], [0, 3]])
    rate = torch.bincount(marks.flatten(), minlength=8).double() / 3
    contribution = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4], dtype=torch.float64)
    seen = Profile(marks, rate, contribution)
    assert shared_neurons(seen, 2, "rate").tolist() == [0, 1]  # 1, 2 and 3 tie: the lowest
    assert shared_neurons(seen, 2, "contribution").tolist() == [6, 7]
    assert split_by_marks(seen, LayerCut(3, 1, 1, 2), np.array([6, 7])).shared.tolist() == [6, 7]


def test_split_loses_no_neuron_and_sorts_within_experts():
    generator = torch.Generator().manual_seed(1)
    marks = torch.rand(50, 32, generator=generator).topk(5, dim=-1).indices
    rate = torch.bincount(marks.flatten(), minlength=32).double() / 50
    seen = Profile(marks, rate, rate)
    split = split_by_marks(seen, LayerCut(6, 2, 3, 4), shared_neurons(seen, 8, "rate"))
    assert sorted(split.neuron_index.tolist()) == list(range(32))
    assert split.routed_RM.shape == (6, 4)
    assert (split.routed_RM[:, 1:] > split.routed_RM[:, :-1]).all()
