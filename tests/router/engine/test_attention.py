"""What attention reads of the cache: a sequence's own slots, whatever lies in all others."""

import numpy as np
import pytest
import torch
from torch import nn

from pregate.base.errors import UserError
from pregate.router.engine.attention import StepLayout, paged_attention
from pregate.router.engine.kv_cache import PagedKV

HEADS, KV_HEADS, WIDTH = 4, 2, 8
#: Slots of three sequences' contexts, of unlike length, in a cache of 20.
CONTEXTS = [np.array([7, 3, 12]), np.array([5]), np.array([1, 2, 4, 6, 8, 9, 10, 11])]


def module() -> nn.Module:
    one = nn.Module()
    one.layer_idx, one.is_causal = 0, True  # pyright: ignore
    return one


def filled(poison: float) -> PagedKV:
    """A cache in which the three contexts lie, and `poison` everywhere else a request may have written."""
    kv = PagedKV(20)
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.arange(20)
    kv.write(0, everywhere, *(torch.full((20, KV_HEADS, WIDTH), poison) for _ in range(2)))
    for slots in CONTEXTS:
        shape = (len(slots), KV_HEADS, WIDTH)
        kv.write(0, torch.from_numpy(slots), *(torch.randn(shape, generator=generator) for _ in range(2)))
    return kv


def attend(poison: float, decodes: list[int], chunks: list[tuple[int, int]], **options) -> torch.Tensor:
    """One step of decode tokens of the contexts named, then chunks (rows, context)."""
    kv = filled(poison)
    layout = StepLayout.build(kv, [CONTEXTS[n] for n in decodes], [(rows, CONTEXTS[n]) for rows, n in chunks])
    num_rows = len(decodes) + sum(rows for rows, _ in chunks)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS, num_rows, WIDTH, generator=generator)
    key, value = (torch.randn(1, KV_HEADS, num_rows, WIDTH, generator=generator) for _ in range(2))
    return paged_attention(module(), query, key, value, None, scaling=0.3, pregate_step=layout, **options)[0]


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sliding_window": 2}])
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_what_others_left_in_the_cache_is_never_read(poison, options):
    """Slot 0 and freed slots hold what an overflowed request wrote; decode rows are padded to the longest."""
    for decodes, chunks in (([0, 1, 2], []), ([1, 2], [(2, 0)]), ([], [(3, 0), (5, 2)])):
        clean = attend(0.0, decodes, chunks, **options)
        assert clean.isfinite().all()
        assert torch.equal(attend(poison, decodes, chunks, **options), clean)


def test_a_row_of_a_batch_is_what_it_is_alone():
    together = attend(0.0, [0, 1, 2], [])
    kv = filled(0.0)
    layout = StepLayout.build(kv, [CONTEXTS[0]], [])
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS, 3, WIDTH, generator=generator)
    key, value = (torch.randn(1, KV_HEADS, 3, WIDTH, generator=generator) for _ in range(2))
    query, key, value = (t[:, :, :1] for t in (query, key, value))
    alone = paged_attention(module(), query, key, value, None, scaling=0.3, pregate_step=layout)[0]
    torch.testing.assert_close(alone[0, 0], together[0, 0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dropout": 0.1}, "a mask, dropout or attention that is not causal"),
        ({"s_aux": torch.ones(4)}, "asks attention for s_aux"),
        ({"pregate_step": None}, "is not handed the arguments"),
    ],
)
def test_what_is_not_known_is_refused(options, complaint):
    layout = StepLayout.build(filled(0.0), [CONTEXTS[0]], [])
    rows = torch.zeros(1, HEADS, 1, WIDTH)
    with pytest.raises(UserError, match=complaint):
        paged_attention(module(), rows, rows[:, :2], rows[:, :2], None, **{"pregate_step": layout} | options)
