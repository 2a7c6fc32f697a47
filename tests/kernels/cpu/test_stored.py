"""Experts in the 16 bits they are stored in: any widths, any number of rows, no bit read that is not theirs."""

import ctypes
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

from pregate.kernels import reference
from pregate.kernels.cpu.sixteen_bits import laid_out, run_experts
from pregate.kernels.cpu.stored import MOST_ROWS, StoredFFN
from pregate.kernels.cpu.vectors import LANES
from pregate.kernels.units import GroupRows, LayerUnits
from pregate.kernels.weights import LayerWeights


def experts(hidden: int, width: int, dtype: torch.dtype, num_slots: int = 3) -> LayerWeights:
    generator = torch.Generator().manual_seed(hidden + width)
    gate_up = torch.randn(num_slots, 2 * width, hidden, generator=generator) / hidden**0.5
    return LayerWeights(
        gate_up.to(dtype), (torch.randn(num_slots, hidden, width, generator=generator) / width**0.5).to(dtype)
    )


def expected(x_ND: torch.Tensor, weights: LayerWeights, slot: int) -> torch.Tensor:
    parts = weights.gate_up_SMD[slot].double(), weights.down_SDM[slot].double()
    return reference.expert_ffn(x_ND.double(), *parts, torch.nn.functional.silu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "width"), [(16, 16), (64, 20), (70, 33), (576, 219), (32, 48), (17, 31)])
def test_rows_equal_float64_at_any_width_and_number(dtype, hidden, width):
    weights = experts(hidden, width, dtype)
    ffn = StoredFFN("silu", dtype)
    for counts in ([1], [2, 1], [5, 4, 3], [MOST_ROWS, 1, 7], [MOST_ROWS + 1, 2, 6]):
        x_PD = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(len(counts)))
        rows = GroupRows(np.arange(len(counts))[::-1].copy(), np.array(counts), np.arange(sum(counts)))
        y_PD = ffn.pairs(x_PD, rows, weights)
        wanted = [expected(x, weights, int(slot)) for x, slot in zip(x_PD.split(counts), rows.slots, strict=True)]
        torch.testing.assert_close(y_PD.double(), torch.cat(wanted), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [MOST_ROWS, MOST_ROWS + 1, 3 * MOST_ROWS])
def test_a_layer_of_many_rows_equals_float64(dtype, num_tokens):
    """On both sides of where weights are made float32 first; all tokens through two experts, then the last 20 through
    one more instead, which so is run as few rows beside many."""
    weights, ffn = experts(70, 33, dtype), StoredFFN("silu", dtype)
    units = LayerUnits(weights, np.array([2, 0, 1], dtype=np.int32))
    x_TD = torch.randn(num_tokens, 70, generator=torch.Generator().manual_seed(num_tokens))
    alike_TLK = torch.tensor([0, 2]).repeat(num_tokens, 1, 1)
    some_TLK = alike_TLK.clone()
    some_TLK[-20:, 0, 1] = 1
    every_UTD = torch.stack([expected(x_TD, weights, slot) for slot in (2, 0, 1)])
    for ids_TLK in (alike_TLK, some_TLK):
        found_TD = ffn.layer(x_TD, ffn.segments(ids_TLK, 3, 0).layer(0), units)
        wanted_TD = every_UTD[ids_TLK[:, 0], torch.arange(num_tokens)[:, None]].sum(dim=1)
        torch.testing.assert_close(found_TD.double(), wanted_TD, rtol=0, atol=6e-6)


def test_a_row_is_the_same_bits_whatever_is_beside_it():
    weights = experts(70, 33, torch.bfloat16)
    x_PD = torch.randn(11, 70)
    together = run_experts(x_PD, [2, 0], [7, 4], weights.gate_up_SMD, weights.down_SDM)
    alone = [
        run_experts(x_PD[n : n + 1], [2 if n < 7 else 0], [1], weights.gate_up_SMD, weights.down_SDM) for n in range(11)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_share_the_experts(num_threads):
    weights, x_PD = experts(70, 33, torch.bfloat16, num_slots=5), torch.randn(9, 70)
    given = [4, 0, 2, 3], [3, 1, 4, 1], weights.gate_up_SMD, weights.down_SDM
    alone, before = run_experts(x_PD, *given), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(run_experts(x_PD, *given), alone)
    finally:
        torch.set_num_threads(before)


def test_huge_values_saturate_and_what_is_no_number_stays_none():
    weights = experts(32, 16, torch.float16)
    big = torch.full((1, 32), 1e4)
    torch.testing.assert_close(
        run_experts(big, [1], [1], weights.gate_up_SMD, weights.down_SDM).double(),
        expected(big, weights, 1),
        rtol=1e-5,
        atol=1e-2,
    )
    big[0, 3] = torch.nan
    assert run_experts(big, [1], [1], weights.gate_up_SMD, weights.down_SDM).isnan().all()


def test_nothing_is_read_beyond_the_last_slot():
    """Weights that end where memory does that nobody may read: reading on would kill this process."""
    plain, x_PD = experts(24, 20, torch.bfloat16, num_slots=1), torch.randn(5, 24)
    region = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    protect(np.frombuffer(region, np.uint8).ctypes.data + mmap.PAGESIZE, mmap.PAGESIZE)
    for name in ("gate_up_SMD", "down_SDM"):
        part = getattr(plain, name)
        first = mmap.PAGESIZE - part.nbytes
        moved = (
            torch.frombuffer(region, dtype=part.dtype, count=part.numel(), offset=first).view(part.shape).copy_(part)
        )
        weights = replace(plain, **{name: moved})
        y_PD = run_experts(x_PD, [0], [5], weights.gate_up_SMD, weights.down_SDM)
        torch.testing.assert_close(y_PD.double(), expected(x_PD, plain, 0), rtol=0, atol=3e-6)


def protect(address: int, size: int) -> None:
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0


def test_rows_end_in_a_vector_of_their_own():
    row = torch.arange(1.0, LANES + 3)[None]
    wanted = [*range(1, LANES + 1), *[0] * (LANES - 2), LANES + 1, LANES + 2]
    assert laid_out(row).tolist() == [wanted]
