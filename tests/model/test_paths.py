"""What a table of paths may hold."""

import numpy as np
import pytest

from pregate.model.config import LayerCut
from pregate.model.paths import Paths

CUTS = (LayerCut(4, 1, 2, 8), LayerCut(6, 0, 2, 8))


def _paths(*layers: list[int]) -> Paths:
    return Paths(np.array([layers], dtype=np.int16))


@pytest.mark.parametrize("row", [[0, 3, -1], [2, -1, -1], [-1, -1, -1], [0, 1, 3]])
def test_ascending_ids_with_padding_last(row: list[int]):
    _paths(row, [0, 4, 5]).check(CUTS)


@pytest.mark.parametrize("row", [[-1, 3, -1], [-1, -1, 3], [0, -1, 3], [3, 0, -1], [2, 2, -1]])
def test_padding_elsewhere_and_ids_that_do_not_ascend(row: list[int]):
    for layers in ([row, [0, 4, 5]], [[0, 1, 2], row]):
        with pytest.raises(ValueError, match="must ascend, with -1 padding at the end"):
            _paths(*layers).check(CUTS)


@pytest.mark.parametrize("row", [[0, 4, -1], [0, -2, -2]])
def test_ids_outside_their_layer(row: list[int]):
    with pytest.raises(ValueError, match="outside its layer's routed experts"):
        _paths(row, [0, 4, 5]).check(CUTS)


def test_a_table_of_another_shape_or_type():
    ids = np.zeros((1, 2, 1), dtype=np.int16)
    for wrong in (ids[:, :1], ids[0], ids.astype(np.int64)):
        with pytest.raises(ValueError, match=r"need int16 \[T, 2, k\]"):
            Paths(wrong).check(CUTS)
    with pytest.raises(ValueError, match="do not match ids"):
        Paths(ids, np.ones((1, 2, 2), dtype=np.float32)).check(CUTS)


def test_joining_keeps_weights_and_refuses_to_drop_them():
    plain = _paths([0, 3], [0, 4])
    weighted = Paths(plain.ids, np.full(plain.ids.shape, 0.5, dtype=np.float32))
    joined = Paths.concatenate([weighted, weighted])
    assert joined.weights is not None and joined.weights.shape == (2, 2, 2)
    assert Paths.concatenate([plain, plain]).weights is None
    with pytest.raises(ValueError, match="1 of 2 parts have weights"):
        Paths.concatenate([plain, weighted])
