import os

import numpy as np
import pytest
import torch

from pregate.base.errors import PregateError
from pregate.kernels import reference
from pregate.kernels.cpu import ffn as cpu
from pregate.kernels.cpu import packed as cpu_packed
from pregate.kernels.cpu.ffn import GroupedFFN, LoopFFN
from pregate.kernels.cpu.packed import (
    MANY_ROWS,
    Int8FFN,
    PackedFFN,
    PackedLayout,
    fits_fp16,
    fp16_product,
    onednn_product,
)
from pregate.kernels.cpu.segments import CpuSegments
from pregate.kernels.cpu.stored import StoredFFN
from pregate.kernels.units import GroupRows, LayerUnits
from tests.int8 import needs_int8

D, M, S = 32, 24, 5


class OneDnnFFN(PackedFFN):
    """What packed weights are that fp16 does not hold; those of these tests it holds."""

    def __init__(self, act: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(act, dtype)
        self.layout = PackedLayout(onednn_product, 4)


class Bfloat16FFN(StoredFFN):
    """Weights of these tests as a checkpoint has them."""

    def __init__(self, act: str) -> None:
        super().__init__(act, torch.bfloat16)


EXACT = [LoopFFN, GroupedFFN, PackedFFN, OneDnnFFN, Bfloat16FFN]
ACTS = [(ffn, act) for ffn in EXACT for act in ("silu", "gelu_pytorch_tanh") if (ffn, act[:4]) != (Bfloat16FFN, "gelu")]
needs_fp16 = pytest.mark.skipif(bool(cpu_packed.why_no_fp16()), reason=cpu_packed.why_no_fp16())


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every uninitialised tensor starts as NaN, so that what nobody wrote cannot look right."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_experts(num_slots: int = S, width: int = M, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a checkpoint in bf16."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_slots, 2 * width, D, generator=generator) / D**0.5
    down = torch.randn(num_slots, D, width, generator=generator) / width**0.5
    return gate_up.bfloat16().float(), down.bfloat16().float()


def expected(x_ND, rows: GroupRows, gate_up, down, act):
    """The reference, pair by pair."""
    slots = np.repeat(rows.slots, rows.counts).tolist()
    return torch.cat(
        [
            reference.expert_ffn(x_ND[row : row + 1], gate_up[slot], down[slot], reference.activation(act))
            for row, slot in zip(rows.row_index.tolist(), slots, strict=True)
        ]
    )


def group(slots, counts, num_rows, seed=3) -> GroupRows:
    """Each unit takes random rows, ascending."""
    pick = np.random.default_rng(seed)
    index = np.concatenate([np.sort(pick.choice(num_rows, count, replace=False)) for count in counts])
    return GroupRows(np.array(slots, np.int32), np.array(counts, np.int32), index.astype(np.int32))


@pytest.mark.parametrize(("ffn_class", "act"), ACTS)
@pytest.mark.parametrize(
    ("slots", "counts", "num_rows"),
    [
        ([2], [1], 1),  # one row, one expert
        ([0, 3, 4], [1, 1, 1], 1),  # one row, three experts
        ([1], [9], 9),  # one expert takes all
        ([0, 2, 4], [3, 1, 7], 8),  # slots 1 and 3 are empty
        ([0, 1, 2, 3, 4], [2, 5, 1, 1, 600], 600),  # ragged
        ([4, 0, 2], [3, 6, 2], 7),  # a cache: slots in any order
    ],
)
def test_pairs_equal_the_reference(ffn_class, act, slots, counts, num_rows):
    gate_up, down = random_experts()
    x_ND = torch.randn(num_rows, D, generator=torch.Generator().manual_seed(1))
    ffn, rows = ffn_class(act), group(slots, counts, num_rows)
    y_PD = ffn.pairs(x_ND, rows, ffn.stack(gate_up, down))
    torch.testing.assert_close(y_PD, expected(x_ND, rows, gate_up, down, act), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ffn_class", EXACT)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 64, 257])
@pytest.mark.parametrize("num_k", [1, 3, S])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_layer_equals_float64_token_by_token(ffn_class, num_tokens, num_k, weighted):
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    gate_up, down = random_experts(seed=seed + 1)
    wide = random_experts(1, 2 * M, seed + 2)
    shared = (wide[0][0], wide[1][0])
    x_TD = torch.randn(num_tokens, D, generator=generator)
    ids_TK = torch.rand(num_tokens, S, generator=generator).argsort(dim=1)[:, :num_k].sort(dim=1).values
    # Tokens with fewer experts, and one expert that nobody takes.
    ids_TK = torch.where((torch.rand(ids_TK.shape, generator=generator) < 0.3) | (ids_TK == 3), -1, ids_TK)
    weights_TK = torch.rand(num_tokens, num_k, generator=generator) if weighted else None
    wanted = reference.add_routed(
        reference.expert_ffn(x_TD.double(), shared[0].double(), shared[1].double(), torch.nn.functional.silu),
        x_TD.double(),
        ids_TK,
        weights_TK,
        gate_up.double(),
        down.double(),
        torch.nn.functional.silu,
    )
    ffn = ffn_class("silu")
    segment = CpuSegments(ids_TK[:, None], S, None if weights_TK is None else weights_TK[:, None]).layer(0)
    got = ffn.layer(x_TD, segment, ffn.units(shared, 2, gate_up, down))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    alone = CpuSegments(torch.full_like(ids_TK, -1)[:, None], S).layer(0)
    only = ffn.layer(x_TD, alone, ffn.units(shared, 2, gate_up, down))
    assert torch.equal(only, ffn.dense(x_TD, ffn.stack(*wide))), "the shared expert only"
    nothing = ffn.layer(x_TD, alone, ffn.units(None, 0, gate_up, down))
    assert torch.equal(nothing, torch.zeros_like(x_TD)), "no shared expert and no routed one: nothing"


@pytest.mark.parametrize("ffn_class", [*EXACT, Int8FFN])
def test_a_unit_without_a_slot_is_an_error(ffn_class):
    ffn = ffn_class("silu")
    gate_up, down = random_experts()
    with pytest.raises(PregateError, match=r"units \[1\]"):
        ffn.pairs(torch.ones(2, D), group([0, -1], [1, 2], 2), ffn.stack(gate_up, down))
    segment = CpuSegments(torch.tensor([[[0, 2]], [[2, -1]]]), S).layer(0)
    units = ffn.units(None, 0, gate_up, down)
    absent = LayerUnits(units.weights, np.array([0, 1, -1, 3, 4], np.int32))
    with pytest.raises(PregateError, match=r"units \[2\]"):
        ffn.layer(torch.ones(2, D), segment, absent)
    unused = LayerUnits(units.weights, np.array([0, -1, 2, -1, 4], np.int32))
    torch.testing.assert_close(
        ffn.layer(torch.ones(2, D), segment, unused), ffn.layer(torch.ones(2, D), segment, units)
    )


def test_a_segment_of_other_units_or_tokens_is_refused():
    ffn = LoopFFN("silu")
    units = ffn.units(None, 0, *random_experts())
    ids_TLK = torch.tensor([[[0, 2]], [[2, -1]]])
    with pytest.raises(ValueError, match="segment of 6 units and 2 tokens; the layer has 5 and 2"):
        ffn.layer(torch.ones(2, D), CpuSegments(ids_TLK, S + 1).layer(0), units)
    with pytest.raises(ValueError, match="2 tokens; the layer has 5 and 3"):
        ffn.layer(torch.ones(3, D), CpuSegments(ids_TLK, S).layer(0), units)


@needs_int8
def test_int8_is_near_and_not_exact():
    ffn, exact = Int8FFN("silu"), LoopFFN("silu")
    gate_up, down = random_experts()
    x_ND, rows = torch.randn(9, D, generator=torch.Generator().manual_seed(2)), group([0, 3], [6, 7], 9)
    wanted = exact.pairs(x_ND, rows, exact.stack(gate_up, down))
    error = (ffn.pairs(x_ND, rows, ffn.stack(gate_up, down)) - wanted).norm() / wanted.norm()
    assert 0.001 < error < 0.05


@needs_int8
def test_int8_answers_for_a_row_whatever_is_beside_it():
    ffn = Int8FFN("silu")
    weights = ffn.stack(*random_experts())
    x_ND = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    outlier = torch.cat([1000 * x_ND[:1] + 1, x_ND])
    together = ffn.dense(x_ND, weights)
    assert torch.equal(ffn.dense(outlier, weights)[1:], together)
    assert torch.equal(ffn.dense(x_ND[4:5], weights), together[4:5])


@pytest.mark.parametrize("ffn_class", [*EXACT, Int8FFN])
def test_a_slot_moves_as_it_is_held(ffn_class):
    ffn = ffn_class("silu")
    gate_up, down = random_experts()
    old, new = ffn.stack(gate_up, down), ffn.layout.allocate(2, M, D)
    assert new.num_slots == 2
    ffn.layout.move(old, 4, new, 0)
    ffn.layout.put(new, 1, gate_up[2], down[2])
    x_ND = torch.randn(3, D, generator=torch.Generator().manual_seed(2))
    moved = ffn.pairs(x_ND, group([0, 1], [2, 3], 3), new)
    assert torch.equal(moved, ffn.pairs(x_ND, group([4, 2], [2, 3], 3), old))
    item = {Int8FFN: 1, Bfloat16FFN: 2}.get(ffn_class, 4)
    assert new.slot_bytes == 3 * M * D * item


def test_grouped_weights_lie_transposed_and_keep_their_shapes():
    ffn, (gate_up, down) = GroupedFFN("silu"), random_experts()
    weights = ffn.stack(gate_up.bfloat16(), down.double())
    assert torch.equal(weights.gate_up_SMD, gate_up.bfloat16().float()) and torch.equal(weights.down_SDM, down)
    assert weights.gate_up_SMD[1].t().is_contiguous() and weights.down_SDM[1].t().is_contiguous()
    assert LoopFFN("silu").stack(gate_up, down).down_SDM.data_ptr() == down.data_ptr(), "the loop shares the caller's"


def test_unaligned_rows_are_refused_with_the_width():
    assert "43" in GroupedFFN.why_not(torch.float32, [64, 43])
    assert GroupedFFN.why_not(torch.float32, [64, 44]) == ""


def test_a_product_that_answers_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_packed, "onednn_product", lambda weight: lambda x: x)
    assert "wrong answers" in PackedFFN.why_not(torch.float32, ())


@needs_fp16
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 70])
def test_fp16_weights_lose_nothing(num_rows):
    """Against float64, as near as sums in fp32 are in any order; so also what lies below fp16's normal numbers."""
    generator = torch.Generator().manual_seed(num_rows)
    weight = (torch.randn(48, 96, generator=generator) * 0.02).bfloat16().float()
    weight[::7] *= 2.0**-9
    x = torch.randn(num_rows, 96, generator=generator)
    assert fits_fp16(weight)
    wanted = x.double() @ weight.double().t()
    error = (fp16_product(weight)(x).double() - wanted).abs()
    sums = x.double().abs() @ weight.double().abs().t()
    assert (error < 2**-24 * 96**0.5 * sums + 1e-6).all()


@needs_fp16
def test_only_what_fp16_holds_is_kept_in_it(monkeypatch):
    """Any of: values of fp32, too large, infinite, no number, all of them below what fp16 tells apart."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    rounded = weight.bfloat16().float()
    lost = [weight, rounded * 1e5, rounded * 1e-7, rounded / 0, rounded * float("nan")]
    assert [fits_fp16(w) for w in (rounded, weight.half().float(), torch.zeros(2, 2), *lost)] == [True] * 3 + [
        False
    ] * 5
    taken = []
    for name in ("fp16_product", "onednn_product"):
        monkeypatch.setattr(cpu_packed, name, lambda weight, name=name: taken.append(name))
    for w in (rounded, weight):
        cpu_packed.product_of(w)
    assert taken == ["fp16_product", "onednn_product"]


@needs_fp16
def test_the_newer_form_of_the_fp16_product_is_used_where_the_older_is_gone(monkeypatch):
    weight, x = torch.randn(8, 16).half().float(), torch.randn(3, 16)
    wanted = fp16_product(weight)(x)
    monkeypatch.delattr(torch, "fbgemm_pack_gemm_matrix_fp16")
    cpu_packed._fbgemm.cache_clear()
    torch.testing.assert_close(fp16_product(weight)(x), wanted)
    cpu_packed._fbgemm.cache_clear()


def test_half_precision_needs_native_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "bfloat16" in cpu.why_not_dtype(torch.bfloat16)
    assert cpu.why_not_dtype(torch.float32) == ""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpu.why_not_dtype(torch.bfloat16) == ""
    assert "float16" in cpu.why_not_dtype(torch.float16)


@pytest.mark.parametrize("slots", [[3, 5, 6], [0, 30, 61], [61, 2, 30]])
def test_units_of_a_pool_lie_anywhere_in_it(slots):
    """Side by side they go through one grouped product, far apart through the loop; the answers are the same."""
    generator = torch.Generator().manual_seed(0)
    ffn = GroupedFFN("silu")
    pairs = [(torch.randn(32, 16, generator=generator), torch.randn(16, 16, generator=generator)) for _ in slots]
    pool = ffn.layout.allocate(64, 16, 16)
    for slot, pair in zip(slots, pairs, strict=True):
        ffn.layout.put(pool, slot, *pair)
    x_ND = torch.randn(4, 16, generator=generator)
    rows = GroupRows(np.array(slots), np.array([2, 3, 1]), np.array([0, 1, 0, 2, 3, 3]))
    wanted = [
        reference.expert_ffn(x_ND[n], *pair, torch.nn.functional.silu)
        for n, pair in zip(([0, 1], [0, 2, 3], [3]), pairs, strict=True)
    ]
    torch.testing.assert_close(ffn.pairs(x_ND, rows, pool), torch.cat(wanted), rtol=0, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_give_the_answers_of_few(weighted):
    """A step of many rows adds one expert after another; each row's answer is what it is among few."""
    ffn, (gate_up, down) = PackedFFN("silu"), random_experts()
    num_units, num_tokens = len(down), MANY_ROWS
    generator = torch.Generator().manual_seed(5)
    ids_T1K = torch.rand(num_tokens, num_units, generator=generator).argsort(1)[:, None, :2]
    weights_T1K = torch.rand(num_tokens, 1, 2, generator=generator) if weighted else None
    x_TD = torch.randn(num_tokens, down.shape[1], generator=generator)
    units = ffn.units(None, 0, gate_up, down)
    many_TD = ffn.layer(x_TD, ffn.segments(ids_T1K, num_units, 0, weights_T1K).layer(0), units)
    for start in range(0, num_tokens, 64):
        part = slice(start, start + 64)
        some = None if weights_T1K is None else weights_T1K[part]
        few_TD = ffn.layer(x_TD[part], ffn.segments(ids_T1K[part], num_units, 0, some).layer(0), units)
        assert torch.allclose(few_TD, many_TD[part], rtol=1e-5, atol=1e-6)
