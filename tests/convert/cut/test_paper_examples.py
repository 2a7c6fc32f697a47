"""CMoE's recipe on matrices small enough to work out by hand; the notes' own implementation is held to the same.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN, R routed experts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pregate.convert.cut.cmoe import Profile, profile, shared_neurons, split_by_marks
from pregate.kernels.reference import activation
from pregate.model.config import LayerCut
from pregate.model.gated_mlp import GatedMLP
from tests.convert.cut import independent_cmoe as notes
from tests.convert.cut.paper_cuts import PAPER_TEXT, cut_by_recipe, float64, gated_mlp, groups_of, weights_of

# Four tokens and six neurons; experts of two neurons, one of three shared, one active, three marks per token.
#
# The tokens lie along the four axes, so h of token t and neuron i is SiLU(g_i[t]) u_i[t] with rows of unit length. A
# neuron whose gate and up row are both 1 on n axes and 0 elsewhere has, on each of them, v = 1 / sqrt(n) and
#   h = SiLU(v) v = v^2 / (1 + e^-v):   n = 1: 0.731   n = 2: 0.335   n = 3: 0.214   n = 4: 0.156
# Neuron 3 has -1 everywhere in its gate row and 1 in its up row: h = SiLU(-1/2) / 2 = -0.094 at every token.
#
#   neuron       tokens            |h| there    marks      rate   (three largest per token; at 3: 1, 2, 5 before 3)
#     0         0  1               0.335        1 1 0 0    2/4
#     1         0  1  2  3         0.156        1 1 1 1    4/4    shared
#     2               2  3         0.335        0 0 1 1    2/4
#     3         all, negative      0.094        0 0 0 0    0
#     4         0  1  2            0.214        1 1 1 0    3/4    shared
#     5                  3         0.731        0 0 0 1    1/4
#
# First centroids: neurons 0 and 2. L1 distances to them: neuron 0: 0 4; 2: 4 0; 3: 2 2; 5: 3 1. Neurons 3 and 5 must
# part: 3 to the first and 5 to the second costs 2 + 1, the other way round 3 + 2. Groups {0, 3} and {2, 5}, cost 3.
# Both members of a pair are as near to its mean: the lower, neurons 0 and 2, speak for them.
AXES = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]]


def _first_example() -> tuple[GatedMLP, torch.Tensor]:
    up = torch.tensor(AXES, dtype=torch.float32)
    gate = up * torch.tensor([1, 1, 1, -1, 1, 1])[:, None]
    lengths = torch.tensor([3.0, 0.5, 1.0, 40.0, 2.0, 0.1])[:, None]  # nothing to a cosine; raw, neuron 3 would win
    down = torch.arange(24, dtype=torch.float32).view(4, 6)
    return gated_mlp(gate, up * lengths, down), torch.diag(torch.tensor([2.0, 1.0, 0.5, 3.0]))


@torch.no_grad()
def test_first_example_by_hand():
    mlp, x_TD = _first_example()
    seen = profile(x_TD, mlp, activation("silu"), 3)
    assert [sorted(marks) for marks in seen.marks_TK.tolist()] == [[0, 1, 4], [0, 1, 4], [1, 2, 4], [1, 2, 5]]
    assert seen.rate_I.tolist() == [0.5, 1.0, 0.5, 0.0, 0.75, 0.25]
    assert shared_neurons(seen, 2, "rate").tolist() == [1, 4]
    routed = cut_by_recipe(mlp, x_TD, (3, 1, 1), {"marks_per_token": 3})
    assert groups_of(routed) == ([1, 4], [[0, 3], [2, 5]])
    # The router: unit rows of neurons 0 and 2, tokens as they are. Token 0, (2 0 0 0): v = 2 / sqrt 2, and the score of
    # expert 0 is v^2 / (1 + e^-v) = 2 / (1 + e^-1.41421) = 1.60886; that of expert 1 is 0. Tokens 0 and 1 have no part
    # in neuron 2 nor 2 and 3 in neuron 0.
    scores_TR = routed.gate(x_TD)
    assert scores_TR[0].tolist() == pytest.approx([1.60886, 0.0], abs=1e-5)
    assert routed.gate.choose(x_TD).ids.tolist() == [[0], [0], [1], [1]]
    assert routed.gate.choose(x_TD).weights is None


def test_the_first_example_says_the_same_of_the_notes():
    mlp, x_TD = _first_example()
    gate, up, _ = weights_of(mlp)
    marks_TI = notes.mark(notes.profile(float64(x_TD), gate, up, notes.RELEASED), 3)
    assert marks_TI.T.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0] * 4, [1, 1, 1, 0], [0, 0, 0, 1]]
    split = notes.split_marks(marks_TI, 3, 1, notes.RELEASED)
    assert (split.shared.tolist(), split.cost) == ([1, 4], 3.0)
    assert [split.members(expert).tolist() for expert in (0, 1)] == [[0, 3], [2, 5]]
    assert split.representatives_R.tolist() == [0, 2]


# The paper's text on four tokens and six neurons: two experts of three, none shared, one active, three marks.
#
# Tokens again along the axes. Every gate row is 10 everywhere, SiLU(10) = 9.9995, so raw h is about 10 u.
#
#   neuron        up row            marks (the three largest |u| of each column)     rate
#     0       -90  90   9   0       1 1 1 0                                          3/4
#     1        40  40   0   0       1 1 0 0                                          2/4
#     2         1   0   0   0       1 0 0 0                                          1/4
#     3         0   3   3   3       0 1 1 1                                          3/4
#     4         0   0   2   2       0 0 1 1                                          2/4
#     5         0   0 1.5   3       0 0 0 1                                          1/4
#
# By direction token 2 would mark 5 (0.447 of its length) before 0 (0.071): cosine profiling marks 3, 4, 5 there.
#
# First centroids: neurons 0 and 3. L2 distances to 1110 and 0111:
#   neuron 0: 0  sqrt 2;   1: 1  sqrt 3;   2: sqrt 2  2;   3: sqrt 2  0;   4: sqrt 3  1;   5: 2  sqrt 2
# Every neuron prefers its own half: {0, 1, 2} and {3, 4, 5}, cost 2 + 2 sqrt 2. Mean of the first (1, 2/3, 1/3, 0):
# squared distances 5/9, 2/9, 5/9, so neuron 1 speaks, and by the same sums neuron 4. The next assignment changes
# nothing, at a cost of 2 (2 sqrt 5 + sqrt 2) / 3.
UPS = [[-90, 90, 9, 0], [40, 40, 0, 0], [1, 0, 0, 0], [0, 3, 3, 3], [0, 0, 2, 2], [0, 0, 1.5, 3]]


def _second_example() -> tuple[GatedMLP, torch.Tensor]:
    return gated_mlp(torch.full((6, 4), 10.0), torch.tensor(UPS), torch.ones(4, 6)), torch.eye(4)


def test_second_example_by_hand():
    mlp, x_TD = _second_example()
    seen = profile(x_TD, mlp, activation("silu"), 3, "raw")
    assert [sorted(marks) for marks in seen.marks_TK.tolist()] == [[0, 1, 2], [0, 1, 3], [0, 3, 4], [3, 4, 5]]
    by_direction = profile(x_TD, mlp, activation("silu"), 3, "cosine")
    assert sorted(by_direction.marks_TK[2].tolist()) == [3, 4, 5]
    assert seen.rate_I.tolist() == [0.75, 0.5, 0.25, 0.75, 0.5, 0.25]
    routed = cut_by_recipe(mlp, x_TD, (2, 0, 1), PAPER_TEXT | {"marks_per_token": 3})
    assert groups_of(routed) == ([], [[0, 1, 2], [3, 4, 5]])
    # The router: neurons 1 and 4 as they are. Token 1: SiLU(10) 40 = 399.982 and 0.
    assert routed.gate(x_TD)[1].tolist() == pytest.approx([399.982, 0.0], abs=1e-3)
    assert routed.gate.choose(x_TD).ids.tolist() == [[0], [0], [1], [1]]
    # Backwards along axis 0, SiLU(-10) (-40) is positive, 0.0182; and 400 times the token is not 400 times the score.
    assert routed.gate(-x_TD)[0].tolist() == pytest.approx([0.01816, 0.0], abs=1e-5)


def test_the_second_example_says_the_same_of_the_notes():
    mlp, x_TD = _second_example()
    gate, up, _ = weights_of(mlp)
    marks_TI = notes.mark(notes.profile(float64(x_TD), gate, up, notes.PAPER), 3)
    split = notes.split_marks(marks_TI, 2, 0, notes.PAPER)
    assert [split.members(expert).tolist() for expert in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert split.representatives_R.tolist() == [1, 4]
    assert split.cost == pytest.approx(2 * (2 * math.sqrt(5) + math.sqrt(2)) / 3)
    first = notes.split_marks(marks_TI, 2, 0, notes.Column(False, "euclidean", 1, False, False))
    assert first.cost == pytest.approx(2 + 2 * math.sqrt(2))


# Where the two distances part. Ten tokens, three marks each; neurons 4 and 5 are shared and fill the rows up.
#
#   neuron 0 is marked by tokens 0 1 2 3 4 5, 1 by 3 4 5 6 7 8: the highest rates, so the first centroids
#   neuron 2 by 1 2 3 4 5:  off the centroids by {0} and by {1 2 6 7 8}: 1 and 5
#   neuron 3 by 0 1 2 9:    off by {3 4 5 9} and by all of {0 .. 9}: 4 and 10
#
# 0 and 1 stay with themselves, at no cost. 2 to 0 and 3 to 1: L1 11, L2 1 + sqrt 10 = 4.162. The other way round: L1
# 5 + 4 = 9, L2 sqrt 5 + 2 = 4.236. So L1 parts 0 from 2, and L2 does not. (0 and 1 together cost 6, sqrt 6, more.)
@pytest.mark.parametrize(("distance", "groups"), [("l1", [[0, 3], [1, 2]]), ("l2", [[0, 2], [1, 3]])])
def test_third_example_by_hand(distance: str, groups: list[list[int]]):
    marked_by = [{0, 1, 2, 3, 4, 5}, {3, 4, 5, 6, 7, 8}, {1, 2, 3, 4, 5}, {0, 1, 2, 9}, {0, 6, 7, 8, 9}, {6, 7, 8, 9}]
    marks = torch.tensor([[n for n, tokens in enumerate(marked_by) if token in tokens] for token in range(10)])
    rates = torch.tensor([len(tokens) / 10 for tokens in marked_by], dtype=torch.float64)
    shared = np.array([4, 5])
    split = split_by_marks(Profile(marks, rates, rates), LayerCut(2, 1, 1, 2), shared, 1, distance)
    assert split.routed_RM.tolist() == groups
    columns = np.array([[float(token in tokens) for token in range(10)] for tokens in marked_by[:4]])
    labels, cost = notes.assign(columns, columns[:2], "cityblock" if distance == "l1" else "euclidean")
    assert [np.flatnonzero(labels == expert).tolist() for expert in (0, 1)] == groups
    assert cost == pytest.approx(9 if distance == "l1" else 1 + math.sqrt(10))


def test_the_paper_scores_with_the_sign_and_the_code_without():
    gate, up = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[-3.0, 0.0], [0.0, 4.0]])
    mlp, x_TD = gated_mlp(gate, up, torch.ones(2, 2)), torch.tensor([[1.0, 0.5]])
    # Unit rows: |SiLU(1) (-1)| = 0.73106 and SiLU(0.5) 0.5 = 0.15561. As they are: -2.19318, and SiLU(1) 2 = 1.46212.
    for method, scores, chosen in (({}, [0.73106, 0.15561], 0), (PAPER_TEXT, [-2.19318, 1.46212], 1)):
        routed = cut_by_recipe(mlp, x_TD.repeat(2, 1), (2, 0, 1), method | {"marks_per_token": 1})
        by_neuron = dict(zip(routed.neuron_index.tolist(), routed.gate(x_TD)[0].tolist(), strict=True))
        assert [by_neuron[0], by_neuron[1]] == pytest.approx(scores, abs=1e-5)
        assert routed.neuron_index[routed.gate.choose(x_TD).ids[0, 0]] == chosen
