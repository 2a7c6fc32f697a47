from __future__ import annotations

import numpy as np
import pytest

from pregate.convert.measure.overlap import (
    coverage,
    differing_rows,
    overlap_figures,
    overlaps,
    permanent_rows,
    routed_neurons,
    swap_cost,
    swap_figures,
    total_cost,
)
from pregate.model.config import LayerCut

CUT = LayerCut(num_routed=3, num_shared=1, num_active=1, expert_width=3)
#: Three shared rows, then experts [0 1 2], [1 2 3], [4 5 6].
SHARED = np.array([9, 10, 11, 0, 1, 2, 1, 2, 3, 4, 5, 6], dtype=np.int32)


def test_differing_rows_by_hand():
    routed = routed_neurons(SHARED, CUT)
    assert routed.tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6]]
    assert differing_rows(routed).tolist() == [[0, 1, 3], [1, 0, 3], [3, 3, 0]]


def test_swap_bytes_by_hand():
    cost = swap_cost(SHARED, CUT, row_bytes=10)
    assert cost.full == 30
    assert cost.differing_RR.tolist() == [[0, 10, 30], [10, 0, 30], [30, 30, 0]]
    assert cost.mean_differing == pytest.approx(140 / 6)
    assert cost.saved_share == pytest.approx(1 - 140 / 180)
    apart = swap_cost(SHARED, CUT, row_bytes=10, tied=False)
    assert apart.differing_RR.tolist() == [[0, 30, 30], [30, 0, 30], [30, 30, 0]]
    assert cost.describe() == {
        "full_bytes": 30,
        "mean_differing_bytes": 23,
        "saved_share": 0.2222,
        "differing_bytes": [[0, 10, 30], [10, 0, 30], [30, 30, 0]],
    }


def test_layers_add_up():
    other = swap_cost(np.arange(9), LayerCut(3, 0, 1, 3), row_bytes=2)
    both = total_cost([swap_cost(SHARED, CUT, 10), other])
    assert both.full == 36
    assert both.differing_RR.tolist() == [[0, 16, 36], [16, 0, 36], [36, 36, 0]]


def test_a_partition_saves_nothing_and_equal_experts_everything():
    apart = swap_cost(np.arange(12), LayerCut(3, 1, 1, 3), 4)
    assert (apart.saved_share, apart.mean_differing) == (0, apart.full)
    same = swap_cost(np.tile(np.arange(4), 3), LayerCut(3, 0, 1, 4), 4)
    assert (same.saved_share, same.mean_differing) == (1, 0)
    assert swap_cost(np.arange(4), LayerCut(1, 0, 1, 4), 4).saved_share == 0


def test_coverage_overlap_and_permanent_rows():
    assert coverage(SHARED, 20) == 10 / 20
    assert overlaps(SHARED)
    assert not overlaps(np.arange(12))
    assert permanent_rows(SHARED, CUT).tolist() == [9, 10, 11]
    fused = np.array([0, 1, 7, 1, 2, 7, 1, 3, 7])
    assert permanent_rows(fused, LayerCut(3, 0, 1, 3)).tolist() == [1, 7]


def test_the_figures_of_two_layers():
    figures = overlap_figures([SHARED, np.arange(9)], [CUT, LayerCut(3, 0, 1, 3)], [20, 9], row_bytes=10)
    assert figures["coverage"] == [0.5, 1.0]
    assert figures["permanent_channels"] == [3, 0]
    assert figures["stored_rows_per_channel"] == pytest.approx((12 / 10 + 1) / 2)
    assert figures["swap"]["full_bytes"] == 60
    assert figures["swap"]["saved_share_by_layer"] == [0.2222, 0.0]
    assert figures["swap"]["differing_bytes"][0] == [0, 40, 60]
    apart = swap_figures([SHARED, np.arange(9)], [CUT, LayerCut(3, 0, 1, 3)], row_bytes=10, tied=False)
    assert apart["saved_share_by_layer"] == [0.0, 0.0]
    assert apart["mean_differing_bytes"] == apart["full_bytes"] == 60
