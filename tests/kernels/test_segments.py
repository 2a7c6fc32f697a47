import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pregate.kernels import segments
from pregate.kernels.segments import build, max_tiles, tile_list

WORKED = torch.tensor([[[0, 1]], [[1, -1]], [[-1, 0]]])


def test_worked_example():
    built = build(WORKED, 2, num_shared=1, block_m=2)
    assert built.row_pair.tolist() == [[0, 3, 6, 1, 8, 2, 4, 0, 0]]
    assert built.row_token.tolist() == [[0, 1, 2, 0, 2, 0, 1, 0, 0]]
    assert built.row_of.tolist() == [[[0, 3, 5], [1, 6, -1], [2, -1, 4]]]
    assert built.offsets.tolist() == [[0, 3, 5, 7]]
    assert built.num_tiles.tolist() == [4]
    assert built.tiles[0, :4].tolist() == [[0, 0, 2], [0, 2, 3], [1, 3, 5], [2, 5, 7]]
    names = ("row_pair", "row_token", "row_of", "offsets", "num_tiles", "tiles")
    assert {getattr(built, name).dtype for name in names} == {torch.int32}


@pytest.mark.parametrize(
    ("num_tokens", "num_k", "num_shared"), [(1, 1, 0), (1, 2, 2), (8, 7, 1), (130, 3, 0), (9, 0, 2)]
)
def test_every_place_has_its_row_and_every_row_a_tile(num_tokens, num_k, num_shared):
    pick = np.random.default_rng(num_tokens)
    num_layers, num_routed, block_m = 3, 7, 16
    ids = np.stack([pick.permuted(np.arange(num_routed)) for _ in range(num_tokens * num_layers)])
    ids = ids.reshape(num_tokens, num_layers, num_routed)[:, :, :num_k]
    ids = np.where(pick.random(ids.shape) < 0.2, -1, ids)
    built = build(torch.from_numpy(ids), num_routed, num_shared=num_shared, block_m=block_m)
    for number in range(num_layers):
        one = built.layer(number)
        offsets, num_rows = one.offsets.tolist(), int(one.offsets[-1])
        unit_of_row = np.repeat(np.arange(one.num_units), np.diff(offsets))
        for token in range(num_tokens):
            units = [*range(num_shared), *(-1 if e < 0 else e + num_shared for e in ids[token, number].tolist())]
            for column, (unit, row) in enumerate(zip(units, one.row_of[token].tolist(), strict=True)):
                assert (row < 0) == (unit < 0)
                if row >= 0:
                    assert unit_of_row[row] == unit and one.row_token[row] == token
                    assert one.row_pair[row] == token * (num_shared + num_k) + column
        assert num_rows == int((one.row_of >= 0).sum())
        covered = [r for unit, first, end in one.tiles[: one.num_tiles[0]].tolist() for r in range(first, end)]
        assert covered == list(range(num_rows)), "each row in one tile, in order"
        for unit, first, end in one.tiles[: one.num_tiles[0]].tolist():
            assert set(unit_of_row[first:end]) == {unit} and end - first <= block_m
        for start, end in itertools.pairwise(offsets):
            assert (np.diff(one.row_token[start:end]) > 0).all(), "tokens ascend within a unit"


def test_routing_weights_follow_the_rows():
    weights = torch.tensor([[[0.5, 0.25]], [[2.0, 9.0]], [[9.0, 3.0]]])
    one = build(WORKED, 2, num_shared=1, weights_TLK=weights).layer(0)
    assert one.row_weight is not None
    assert one.row_weight[:7].tolist() == [1.0, 1.0, 1.0, 0.5, 3.0, 0.25, 2.0]


def test_tile_bound_is_reached_and_never_passed():
    ids = torch.zeros(17, 1, 2, dtype=torch.int64)
    ids[:, 0, 1] = 1
    built = build(ids, 2, block_m=16)
    assert built.num_tiles.tolist() == [4] == [max_tiles(34, 2, 16)]
    assert max_tiles(3, 8, 64) == 3


def test_tile_list_worked_example():
    assert tile_list(np.array([3, 0, 1]), 2).tolist() == [[0, 0, 2], [0, 2, 3], [2, 3, 4]]
    assert tile_list(np.array([5]), 64).dtype == np.int32


@pytest.mark.parametrize("bad", [-2, 7])
def test_an_id_that_is_no_expert_is_refused(bad):
    with pytest.raises(ValueError, match=r"\[-1, 7\)"):
        segments.build(torch.tensor([[[0, bad]]]), 7)


def test_no_tokens_give_no_rows():
    built = build(torch.zeros(0, 2, 3, dtype=torch.int64), 4, num_shared=1)
    assert built.num_tiles.tolist() == [0, 0] and built.offsets.tolist() == [[0] * 6] * 2


def test_segments_already_there_are_not_copied():
    built = build(WORKED, 2, num_shared=1, weights_TLK=torch.ones(3, 1, 2))
    assert built.to(torch.device("cpu")) is built
    moved = built.to(torch.device("meta"))
    assert moved.row_of.shape == built.row_of.shape and moved.row_of.device.type == "meta"
    assert moved.row_weight is not None and moved.row_weight.device.type == "meta"


def test_ids_that_a_device_found_bad_are_an_error_when_asked():
    build(WORKED, 2).check_ids()
    replace(build(WORKED, 2), bad_ids=torch.tensor([0])).check_ids()
    with pytest.raises(ValueError, match=r"\[-1, 2\); others, by layer: \{1: 3\}"):
        replace(build(WORKED.expand(-1, 2, -1), 2, num_shared=1), bad_ids=torch.tensor([0, 3])).check_ids()
