"""What attention reads of the cache: a sequence's own slots, whatever lies in all others."""

import pytest
import torch
from torch import nn

from pregate.base.errors import UserError
from pregate.kernels import step
from pregate.router.engine import step_layout
from pregate.router.engine.attention import paged_attention
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.step_layout import SequenceSlice, StepLayout

HEADS, KV_HEADS, WIDTH = 4, 2, 8
NUM_BLOCKS, BLOCK = 12, 2
#: Blocks and lengths of three sequences, in a cache of 12 blocks of 2: here and there, and beside each other.
SCATTERED = [([7, 3], 3), ([5], 1), ([1, 2, 4, 6], 8)]
IN_LANES = [([2, 3], 3), ([6], 2), ([8, 9], 4)]
Context = tuple[list[int], int]


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's kernels, or torch's operations as on other devices."""
    if request.param == "torch":
        monkeypatch.setattr(step, "step_kernels", lambda *_: None)
    return request.param


def module() -> nn.Module:
    one = nn.Module()
    one.layer_idx, one.is_causal = 0, True  # pyright: ignore
    return one


def filled(poison: float, contexts: list[Context]) -> PagedKV:
    """A cache in which the contexts lie, and `poison` everywhere else a request may have written."""
    kv = PagedKV(NUM_BLOCKS, BLOCK, [((KV_HEADS, WIDTH), (KV_HEADS, WIDTH))])
    generator = torch.Generator().manual_seed(0)
    kv.write(0, torch.arange(kv.num_slots), *(torch.full((kv.num_slots, KV_HEADS, WIDTH), poison),) * 2)
    for blocks, length in contexts:
        slots = torch.tensor([b * BLOCK + n for b in blocks for n in range(BLOCK)])[:length]
        kv.write(0, slots, *(torch.randn(length, KV_HEADS, WIDTH, generator=generator) for _ in range(2)))
    return kv


def one_step(
    poison: float, decodes: list[int], chunks: list[tuple[int, int]], contexts: list[Context] = SCATTERED, **options
) -> torch.Tensor:
    """One step of decode tokens of the contexts named, then chunks (rows, context)."""
    kv = filled(poison, contexts)
    pieces = [(1, n) for n in decodes] + chunks
    slices = [SequenceSlice(contexts[n][0], contexts[n][1] - rows, contexts[n][1]) for rows, n in pieces]
    layout = StepLayout.build(kv, slices)
    num_rows = sum(rows for rows, _ in pieces)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS, 16, WIDTH, generator=generator)[:, :, :num_rows]
    key, value = (torch.randn(1, KV_HEADS, 16, WIDTH, generator=generator)[:, :, :num_rows] for _ in range(2))
    return paged_attention(module(), query, key, value, None, scaling=0.3, pregate_step=layout, **options)[0]


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sliding_window": 2}])
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_what_others_left_in_the_cache_is_never_read(poison, options):
    """Slot 0 and freed slots hold what an overflowed request wrote; decode rows are padded to the longest."""
    for contexts in (SCATTERED, IN_LANES):
        for decodes, chunks in (([0, 1, 2], []), ([1, 2], [(2, 0)]), ([], [(3, 0), (2, 2)])):
            clean = one_step(0.0, decodes, chunks, contexts, **options)
            assert clean.isfinite().all()
            assert torch.equal(one_step(poison, decodes, chunks, contexts, **options), clean)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sliding_window": 2}])
def test_a_view_over_lanes_gives_what_gathering_gives(options, monkeypatch):
    """In order, in another order with a lane between that is nobody's, and one alone. The kernels need neither."""
    for decodes in ([0, 1, 2], [2, 0], [1]):
        viewed = one_step(0.0, decodes, [], IN_LANES, **options)
        with monkeypatch.context() as patch:
            patch.setattr(step_layout, "_lanes", lambda *_: None)
            gathered = one_step(0.0, decodes, [], IN_LANES, **options)
        torch.testing.assert_close(viewed, gathered)


def test_lanes_are_found_where_blocks_lie_so():
    lanes = step_layout._lanes([0, 64, 192], 20, 256, torch.device("cpu"))
    assert lanes is not None and (lanes.first, lanes.stride, lanes.num) == (0, 64, 4)
    assert lanes.row_B is not None and lanes.row_B.tolist() == [0, 1, 3]
    assert step_layout._lanes([0, 64, 192], 80, 256, torch.device("cpu")) is None, "the last would end past the cache"
    assert step_layout._lanes([0, 64, None], 20, 256, torch.device("cpu")) is None, "one is scattered"
    assert step_layout._lanes([0, 16, 192], 20, 256, torch.device("cpu")) is None, "mostly others' lanes"


def test_a_row_of_a_batch_is_what_it_is_alone():
    together = one_step(0.0, [0, 1, 2], [])
    torch.testing.assert_close(one_step(0.0, [0], [])[0, 0], together[0, 0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dropout": 0.1}, "a mask, dropout or attention that is not causal"),
        ({"s_aux": torch.ones(4)}, "asks attention for s_aux"),
        ({"pregate_step": None}, "is not handed the arguments"),
    ],
)
def test_what_is_not_known_is_refused(options, complaint):
    layout = StepLayout.build(filled(0.0, SCATTERED), [SequenceSlice(SCATTERED[0][0], 2, 3)])
    rows = torch.zeros(1, HEADS, 1, WIDTH)
    with pytest.raises(UserError, match=complaint):
        paged_attention(module(), rows, rows[:, :2], rows[:, :2], None, **{"pregate_step": layout} | options)
