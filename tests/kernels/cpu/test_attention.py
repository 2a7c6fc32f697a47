"""Attention over a paged cache against its twin in double precision, whatever else lies in the cache."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.kernels import reference
from pregate.kernels.cpu import attention

POISONS = [np.nan, np.inf, -np.inf, 0.0]


def attend_to(q_TQE, caches, lengths, tables, blocks, size, scaling, window, softcap):
    out = np.full((len(q_TQE), q_TQE.shape[1], caches[1].shape[2]), np.nan, np.float32)
    arrays = (np.asarray(part, dtype=np.int64) for part in (lengths, tables, blocks))
    attention.attend(q_TQE, *caches, *arrays, size, scaling, window, softcap, out)
    return out


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rows_attend_to_their_own_context_alone(data):
    """Scattered blocks, several rows of one context, queries that share keys, values of another width, windows and
    caps; what is not a row's own is poison."""
    draw = data.draw
    size, num_kv, repeat = draw(st.integers(1, 17)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    widths = draw(st.sampled_from([(8, 8), (5, 3), (64, 64), (24, 16), (80, 80), (1, 1)]))
    contexts = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    window, softcap = draw(st.sampled_from([0, 1, 7, 33])), draw(st.sampled_from([0.0, 0.0, 3.0, 50.0]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    counts = [-(-length // size) for length in contexts]
    order = rng.permutation(sum(counts) + 2)
    blocks = np.zeros((len(contexts), max(counts)), np.int64)
    poison = draw(st.sampled_from(POISONS))
    caches = [np.full((len(order) * size, num_kv, width), poison, np.float32) for width in widths]
    own, start = [], 0
    for n, (length, count) in enumerate(zip(contexts, counts, strict=True)):
        blocks[n, :count] = order[start : start + count]
        slots = np.array([block * size + c for block in order[start : start + count] for c in range(size)])[:length]
        own.append([rng.standard_normal((length, num_kv, width), np.float32) for width in widths])
        for cache, part in zip(caches, own[n], strict=True):
            cache[slots] = part
        start += count
    tables = np.repeat(np.arange(len(contexts)), draw(st.integers(1, 2)))
    lengths = [draw(st.integers(1, contexts[n])) for n in tables]
    heads = rng.standard_normal((len(tables), num_kv * repeat, widths[0]), np.float32) * draw(st.sampled_from([1, 9]))
    heads = heads.astype(np.float32)
    found = attend_to(heads, caches, lengths, tables, blocks, size, 0.3, window, softcap)
    keys, values = (
        torch.from_numpy(np.nan_to_num(cache, nan=0.0, posinf=0.0, neginf=0.0)).double() for cache in caches
    )
    length_A, table_A, block_BN = (torch.from_numpy(np.asarray(part)) for part in (lengths, tables, blocks))
    queries = torch.from_numpy(heads).double()
    expected = reference.attend(queries, keys, values, length_A, table_A, block_BN, size, 0.3, window, softcap)
    np.testing.assert_allclose(found, expected.float().numpy(), rtol=2e-5, atol=2e-5)
    for t, (n, length) in enumerate(zip(tables, lengths, strict=True)):
        alone = attend_to(heads[t : t + 1], caches, [length], [n], blocks, size, 0.3, window, softcap)
        assert np.array_equal(alone[0], found[t]), "a row is the same bits whatever is beside it"


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_query_that_is_no_number_gives_none_and_harms_no_other(softcap):
    rng = np.random.default_rng(0)
    caches = [rng.standard_normal((32, 1, 8), np.float32) for _ in range(2)]
    q = rng.standard_normal((3, 2, 8), np.float32)
    args = [20, 20, 20], [0, 0, 0], [[1, 0]], 16, 0.3, 0, softcap
    clean = attend_to(q, caches, *args)
    q[1, 0, 3] = np.nan
    found = attend_to(q, caches, *args)
    assert np.isnan(found[1, 0]).all()
    found[1, 0] = clean[1, 0]
    assert np.array_equal(found, clean)


def test_scores_far_apart_and_large_overflow_nowhere():
    keys = np.zeros((4, 1, 8), np.float32)
    keys[:, 0, 0] = 1e4, -1e4, 0.0, 1e4
    values = np.arange(4, dtype=np.float32)[:, None, None].repeat(8, axis=2)
    q = np.zeros((1, 1, 8), np.float32)
    q[0, 0, 0] = 1e3
    found = attend_to(q, [keys, values], [4], [0], [[0]], 4, 1.0, 0, 0.0)
    np.testing.assert_allclose(found, 1.5, rtol=1e-6)


def test_place_rotates_the_first_columns_and_stores_what_is_finite():
    """Two queries, one key and value of width 6, of which 4 columns are rotated; slots 3 and 1."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 4, 6, generator=generator)
    angle = torch.randn(2, 4, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    signed = torch.cat([-sin[:, :2], sin[:, 2:]], dim=1)
    heads[0, 2, 5], heads[1, 3, 0], heads[1, 3, 1] = torch.inf, torch.nan, -torch.inf
    keys, values = (np.full((4, 1, 6), 7.0, np.float32) for _ in range(2))
    cache = (torch.from_numpy(part.copy()) for part in (keys, values))
    turned, *cached = reference.place(heads, cos, signed, torch.tensor([3, 1]), *cache)
    attention.place(heads.numpy(), cos.numpy(), signed.numpy(), np.array([3, 1]), keys, values)
    torch.testing.assert_close(heads, turned, equal_nan=True)
    np.testing.assert_allclose(keys, cached[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(values, cached[1])
    assert (keys[[0, 2]] == 7).all() and (values[[0, 2]] == 7).all()
    assert keys[3, 0, 5] == values[1, 0, 0] == values[1, 0, 1] == 0


def test_the_twins_do_what_their_examples_say():
    normed = reference.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert torch.allclose(normed, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    turned = reference.rotate(torch.tensor([[[1.0, 2.0, 9.0]]]), *quarter)
    assert turned.tolist() == [[[-2.0, 1.0, 9.0]]]
    slots = torch.arange(128.0)[:, None, None]  # as values, which are weighed alike
    rows, keys = torch.ones(2, 1, 1), torch.zeros(128, 1, 1)
    lengths, tables, blocks = (torch.tensor(part) for part in ([3, 17], [1, 0], [[4, 2], [7, 0]]))
    found = reference.attend(rows, keys, slots, lengths, tables, blocks, 16, 1.0).flatten().tolist()
    assert found == pytest.approx([113, (sum(range(64, 80)) + 32) / 17])
