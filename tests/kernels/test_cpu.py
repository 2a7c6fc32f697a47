import numpy as np
import pytest
import torch

from pregate.kernels import cpu, reference
from pregate.kernels.cpu import GroupedFFN, LayerWeights, LoopFFN, group_ends

D, M, S = 32, 24, 5


def random_weights() -> LayerWeights:
    generator = torch.Generator().manual_seed(7)
    return LayerWeights(
        torch.randn(S, 2 * M, D, generator=generator) / D**0.5, torch.randn(S, D, M, generator=generator) / M**0.5
    )


def expected(x_PD, slots, counts, weights, act):
    """The reference, expert by expert."""
    pieces = torch.split(x_PD, list(counts))
    return torch.cat(
        [
            reference.expert_ffn(piece, weights.gate_up_SMD[slot], weights.down_SDM[slot], reference.activation(act))
            for piece, slot in zip(pieces, slots, strict=True)
        ]
    )


@pytest.mark.parametrize("ffn_class", [LoopFFN, GroupedFFN])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("slots", "counts"),
    [
        ([2], [1]),  # one row, one expert
        ([0, 3, 4], [1, 1, 1]),  # one row, three experts
        ([1], [9]),  # one expert takes all
        ([0, 2, 4], [3, 1, 7]),  # slots 1 and 3 are empty
        ([0, 1, 2, 3, 4], [2, 5, 1, 1, 600]),  # ragged
    ],
)
def test_implementations_equal_the_reference(ffn_class, act, slots, counts):
    weights = random_weights()
    x_PD = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(1))
    y_PD = ffn_class(act)(x_PD, np.array(slots, np.int32), np.array(counts, np.int32), weights)
    torch.testing.assert_close(y_PD, expected(x_PD, slots, counts, weights, act), rtol=0, atol=1e-6)


def test_group_ends_worked_example():
    assert group_ends(np.array([0, 2]), np.array([3, 4]), 4).tolist() == [3, 3, 7, 7]


def test_unaligned_rows_are_refused_with_the_width():
    assert "43" in cpu.why_not_grouped([64, 43], torch.float32)
    assert cpu.why_not_grouped([64, 44], torch.float32) == ""


def test_half_precision_needs_native_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "bfloat16" in cpu.why_not_dtype(torch.bfloat16)
    assert cpu.why_not_dtype(torch.float32) == ""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpu.why_not_dtype(torch.bfloat16) == ""
    assert "float16" in cpu.why_not_dtype(torch.float16)
