"""`--recipe cmoe-paper`, and the paper's text where it differs, held to an implementation written from the notes alone.

Many assignments of 0/1 columns are equally cheap; where they are, costs are compared and what follows is followed
from the split that was made. Everything else must be equal.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN, R routed experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pregate.cluster.cli import main
from pregate.convert import layer_pass
from pregate.convert.calibration import encode, read_calibration
from pregate.convert.clustering import representatives
from pregate.convert.cmoe import Profile, profile, shared_neurons, split_by_marks
from pregate.convert.layer_cut import cut_one
from pregate.convert.options import ConvertOptions
from pregate.convert.recipes import RECIPES, Recipe
from pregate.kernels.reference import activation
from pregate.model import RoutedForCausalLM
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps
from pregate.model.layers import RoutedMLP
from tests.convert import independent_cmoe as notes

#: What the paper's text has in place of the released code's values.
PAPER_TEXT = {"gate": "representative-signed", "profile": "raw", "distance": "l2", "max_iterations": 4}
METHODS = pytest.mark.parametrize(
    ("method", "column"), [({}, notes.RELEASED), (PAPER_TEXT, notes.PAPER)], ids=["released code", "paper's text"]
)
#: Below this a float32 and a float64 sum may choose differently: a tie.
TIE = 1e-6


def _mlp(gate_ID: torch.Tensor, up_ID: torch.Tensor, down_DI: torch.Tensor) -> GatedMLP:
    return GatedMLP(0, nn.Module(), "mlp", nn.Module(), gate_ID, up_ID, down_DI)


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _weights(mlp: GatedMLP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _float64(mlp.gate), _float64(mlp.up), _float64(mlp.down)


def _cut(mlp: GatedMLP, x_TD: torch.Tensor, counts: tuple[int, int, int], method: dict[str, Any]) -> RoutedMLP:
    """The layer as the recipe cuts it; `counts`: experts, shared, active."""
    experts, shared, active = counts
    fields: dict[str, Any] = {"model": Path("m"), "out": Path("o"), "calibration": (Path("c.txt"),)}
    fields |= {"experts": experts, "shared": shared, "active": active}
    options = ConvertOptions.of_recipe("cmoe-paper", method, **fields)
    parent = LlamaConfig(hidden_size=x_TD.shape[1], intermediate_size=mlp.width, num_attention_heads=1)
    config = RoutedConfig(text_config=parent, gate=options.gate, selection=options.selection)
    return cut_one(mlp, x_TD, config, options)


def _groups(routed: RoutedMLP) -> tuple[list[int], list[list[int]]]:
    """The shared neurons' ids, and each routed expert's."""
    index, width = routed.neuron_index.tolist(), routed.cut.shared_width
    size = routed.cut.expert_width
    return index[:width], [index[start : start + size] for start in range(width, len(index), size)]


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
    return _mlp(gate, up * lengths, down), torch.diag(torch.tensor([2.0, 1.0, 0.5, 3.0]))


@torch.no_grad()
def test_first_example_by_hand():
    mlp, x_TD = _first_example()
    seen = profile(x_TD, mlp, activation("silu"), 3)
    assert [sorted(marks) for marks in seen.marks_TK.tolist()] == [[0, 1, 4], [0, 1, 4], [1, 2, 4], [1, 2, 5]]
    assert seen.rate_I.tolist() == [0.5, 1.0, 0.5, 0.0, 0.75, 0.25]
    assert shared_neurons(seen, 2, "rate").tolist() == [1, 4]
    routed = _cut(mlp, x_TD, (3, 1, 1), {"marks_per_token": 3})
    assert _groups(routed) == ([1, 4], [[0, 3], [2, 5]])
    # The router: unit rows of neurons 0 and 2, tokens as they are. Token 0, (2 0 0 0): v = 2 / sqrt 2, and the score of
    # expert 0 is v^2 / (1 + e^-v) = 2 / (1 + e^-1.41421) = 1.60886; that of expert 1 is 0. Tokens 0 and 1 have no part
    # in neuron 2 nor 2 and 3 in neuron 0.
    scores_TR = routed.gate(x_TD)
    assert scores_TR[0].tolist() == pytest.approx([1.60886, 0.0], abs=1e-5)
    assert routed.gate.choose(x_TD).ids.tolist() == [[0], [0], [1], [1]]
    assert routed.gate.choose(x_TD).weights is None


def test_the_first_example_says_the_same_of_the_notes():
    mlp, x_TD = _first_example()
    gate, up, _ = _weights(mlp)
    marks_TI = notes.mark(notes.profile(_float64(x_TD), gate, up, notes.RELEASED), 3)
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
    return _mlp(torch.full((6, 4), 10.0), torch.tensor(UPS), torch.ones(4, 6)), torch.eye(4)


def test_second_example_by_hand():
    mlp, x_TD = _second_example()
    seen = profile(x_TD, mlp, activation("silu"), 3, "raw")
    assert [sorted(marks) for marks in seen.marks_TK.tolist()] == [[0, 1, 2], [0, 1, 3], [0, 3, 4], [3, 4, 5]]
    by_direction = profile(x_TD, mlp, activation("silu"), 3, "cosine")
    assert sorted(by_direction.marks_TK[2].tolist()) == [3, 4, 5]
    assert seen.rate_I.tolist() == [0.75, 0.5, 0.25, 0.75, 0.5, 0.25]
    routed = _cut(mlp, x_TD, (2, 0, 1), PAPER_TEXT | {"marks_per_token": 3})
    assert _groups(routed) == ([], [[0, 1, 2], [3, 4, 5]])
    # The router: neurons 1 and 4 as they are. Token 1: SiLU(10) 40 = 399.982 and 0.
    assert routed.gate(x_TD)[1].tolist() == pytest.approx([399.982, 0.0], abs=1e-3)
    assert routed.gate.choose(x_TD).ids.tolist() == [[0], [0], [1], [1]]
    # Backwards along axis 0, SiLU(-10) (-40) is positive, 0.0182; and 400 times the token is not 400 times the score.
    assert routed.gate(-x_TD)[0].tolist() == pytest.approx([0.01816, 0.0], abs=1e-5)


def test_the_second_example_says_the_same_of_the_notes():
    mlp, x_TD = _second_example()
    gate, up, _ = _weights(mlp)
    marks_TI = notes.mark(notes.profile(_float64(x_TD), gate, up, notes.PAPER), 3)
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
    mlp, x_TD = _mlp(gate, up, torch.ones(2, 2)), torch.tensor([[1.0, 0.5]])
    # Unit rows: |SiLU(1) (-1)| = 0.73106 and SiLU(0.5) 0.5 = 0.15561. As they are: -2.19318, and SiLU(1) 2 = 1.46212.
    for method, scores, chosen in (({}, [0.73106, 0.15561], 0), (PAPER_TEXT, [-2.19318, 1.46212], 1)):
        routed = _cut(mlp, x_TD.repeat(2, 1), (2, 0, 1), method | {"marks_per_token": 1})
        by_neuron = dict(zip(routed.neuron_index.tolist(), routed.gate(x_TD)[0].tolist(), strict=True))
        assert [by_neuron[0], by_neuron[1]] == pytest.approx(scores, abs=1e-5)
        assert routed.neuron_index[routed.gate.choose(x_TD).ids[0, 0]] == chosen


def _hold(routed: RoutedMLP, mlp: GatedMLP, x_TD: torch.Tensor, options: Recipe, column: notes.Column) -> None:
    """Hold one cut layer to the notes: marks, rates, shared neurons, cost, representatives, choices, output."""
    gate, up, down = _weights(mlp)
    x = _float64(x_TD)
    marks_TI = _marks_agree(mlp, x_TD, options, column)
    cut = routed.cut
    split = notes.split_marks(marks_TI, cut.num_routed + cut.num_shared, cut.num_shared, column)
    shared, groups = _groups(routed)
    assert shared == split.shared.tolist()
    assert sorted(sum(groups, shared)) == list(range(mlp.width))
    _costs_agree(mlp, x_TD, cut, options, column, marks_TI, groups)
    ours = _split_of(routed, split, marks_TI)
    ours = _with_representatives(ours, routed, mlp, marks_TI, column)
    _outputs_agree(routed, x_TD, ours, (x, gate, up, down), column)


def _marks_agree(mlp: GatedMLP, x_TD: torch.Tensor, options: Recipe, column: notes.Column) -> np.ndarray:
    gate, up, _ = _weights(mlp)
    hidden_TI = notes.profile(_float64(x_TD), gate, up, column)
    ranked_TI = np.sort(np.abs(hidden_TI), axis=1)[:, ::-1]
    last = options.marks_per_token
    assert (ranked_TI[:, last - 1] - ranked_TI[:, last]).min() > 1e-8 * ranked_TI.max()  # no tie in what follows
    marks_TI = notes.mark(hidden_TI, last)
    seen = profile(x_TD, mlp, activation("silu"), last, options.profile)
    assert np.array_equal(torch.zeros(marks_TI.shape).scatter_(1, seen.marks_TK, 1.0).numpy(), marks_TI)
    assert np.allclose(seen.rate_I.numpy(), marks_TI.mean(axis=0), rtol=1e-12)
    return marks_TI


def _costs_agree(
    mlp: GatedMLP,
    x_TD: torch.Tensor,
    cut: LayerCut,
    options: Recipe,
    column: notes.Column,
    marks_TI: np.ndarray,
    groups: list[list[int]],
) -> None:
    """After each number of iterations the groups cost as little as they can, from the centroids before."""
    seen = profile(x_TD, mlp, activation("silu"), options.marks_per_token, options.profile)
    shared = shared_neurons(seen, cut.shared_width, "rate")
    routed = np.setdiff1d(np.arange(mlp.width), shared)
    columns_QT = marks_TI[:, routed].T
    centroids_RT = columns_QT[notes.by_rate(marks_TI.mean(axis=0)[routed])[: cut.num_routed]]
    made = np.empty((0, 0))
    for iterations in range(1, options.max_iterations + 1):
        made = split_by_marks(seen, cut, shared, iterations, options.distance).routed_RM
        labels_Q = np.array([int(np.flatnonzero((made == neuron).any(axis=1))[0]) for neuron in routed])
        distance_QR = notes.distances(columns_QT, centroids_RT, column.distance)
        cost = distance_QR[np.arange(len(routed)), labels_Q].sum()
        assert cost == pytest.approx(notes.assign(columns_QT, centroids_RT, column.distance)[1], rel=1e-9)
        centroids_RT = notes.means(columns_QT, labels_Q, cut.num_routed)
    assert made.tolist() == groups


def _split_of(routed: RoutedMLP, split: notes.Split, marks_TI: np.ndarray) -> notes.Split:
    """The notes' split with the groups that were made, which may be others at the same cost."""
    _, groups = _groups(routed)
    labels_Q = np.array([next(e for e, group in enumerate(groups) if neuron in group) for neuron in split.routed])
    centroids_RT = notes.means(marks_TI[:, split.routed].T, labels_Q, len(groups))
    return notes.Split(split.rates_H, split.shared, split.routed, labels_Q, 0.0, centroids_RT, split.representatives_R)


def _with_representatives(
    split: notes.Split, routed: RoutedMLP, mlp: GatedMLP, marks_TI: np.ndarray, column: notes.Column
) -> notes.Split:
    """Who speaks for each expert is a member as near to the mean as any, and the gate has its rows."""
    gate, up, _ = _weights(mlp)
    weight = _float64(routed.gate.weight)
    chosen = []
    for expert, centroid_T in enumerate(split.centroids_RT):
        members = split.members(expert)
        away = notes.distances(marks_TI[:, members].T, centroid_T[None], column.distance)[:, 0]
        nearest = members[away < away.min() + 1e-9]
        rows = np.concatenate([gate[nearest], up[nearest]])
        rows = notes.unit_rows(rows) if column.unit_router else rows
        wanted = np.concatenate([weight[expert], weight[expert + len(weight) // 2]])
        pairs = np.concatenate(np.split(rows, 2), axis=1)
        equal = np.flatnonzero(np.abs(pairs - wanted).max(axis=1) < 1e-6)
        assert len(equal) == 1
        assert equal[0] == 0  # of several as near the lowest id
        chosen.append(nearest[0])
    by_ours = representatives(
        torch.from_numpy(marks_TI.argsort(axis=1, kind="stable")[:, ::-1][:, : int(marks_TI[0].sum())].copy()),
        np.stack([split.members(e) for e in range(len(chosen))]),
        "l1" if column.distance == "cityblock" else "l2",
    )
    assert by_ours.tolist() == chosen
    return notes.Split(
        split.rates_H, split.shared, split.routed, split.labels_Q, 0.0, split.centroids_RT, np.array(chosen)
    )


@torch.no_grad()
def _outputs_agree(
    routed: RoutedMLP, x_TD: torch.Tensor, split: notes.Split, arrays: tuple[np.ndarray, ...], column: notes.Column
) -> None:
    """Choices of every token equal away from ties, and outputs; as converted, then with bias and scale set."""
    x, gate, up, down = arrays
    num_routed, num_active = routed.cut.num_routed, routed.cut.num_active
    paper = routed.paper_gate
    assert paper is not None
    scores_TR = notes.router_scores(x, gate, up, split.representatives_R, column)
    assert np.allclose(_float64(routed.gate(x_TD)), scores_TR, rtol=1e-4, atol=1e-5)
    generator = np.random.default_rng(1)
    for bias_std, scale_std in ((0.0, 0.0), (0.2, 0.5)):
        paper.balance_bias.copy_(torch.from_numpy(generator.normal(0, bias_std, num_routed)))
        paper.scale.copy_(torch.from_numpy(generator.normal(0, scale_std, num_routed)))
        bias, scale = _float64(paper.balance_bias), _float64(paper.scale)
        weights_TR = notes.choose(scores_TR, num_active, bias, scale)
        ranked = np.sort(notes.softmax(scores_TR) + bias, axis=1)[:, ::-1]
        clear = ranked[:, num_active - 1] - ranked[:, num_active] > TIE
        assert clear.mean() > 0.9
        ids = routed.gate.choose(x_TD).ids.numpy()
        theirs = np.stack([np.flatnonzero(row) for row in weights_TR])
        assert np.array_equal(ids[clear], theirs[clear])
        expected = notes.layer_output(x, gate, up, down, split, weights_TR)
        assert np.abs(_float64(routed(x_TD)) - expected)[clear].max() < 1e-4 * np.abs(expected).max()
        if scale.any():
            plain = notes.layer_output(x, gate, up, down, split, (weights_TR != 0).astype(float))
            assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()  # the scale does show


@METHODS
@pytest.mark.parametrize(("counts", "seed"), [((8, 3, 3), 0), ((8, 0, 2), 1), ((4, 1, 1), 2), ((16, 2, 2), 3)])
def test_a_random_ffn_is_cut_as_the_notes_say(method: dict, column: notes.Column, counts: tuple, seed: int):
    generator = torch.Generator().manual_seed(seed)
    # Rows near a few directions, of many lengths: unrelated columns would cost as little by either distance.
    directions, lengths = torch.randn(3, 12, generator=generator), 0.3 + torch.rand(48, 1, generator=generator)
    latent = torch.randn(48, 3, generator=generator)
    gate, up = (lengths * (latent @ directions + 0.2 * torch.randn(48, 12, generator=generator)) for _ in range(2))
    mlp = _mlp(gate, up, torch.randn(12, 48, generator=generator))
    x_TD = 0.1 * torch.randn(150, 12, generator=generator)
    method = method | {"marks_per_token": 5}
    routed = _cut(mlp, x_TD, counts, method)
    _hold(routed, mlp, x_TD, Recipe(**(vars(RECIPES["cmoe-paper"]) | method)), column)


@METHODS
def test_a_tiny_llama_is_converted_as_the_notes_say(
    method: dict,
    column: notes.Column,
    tiny_dense: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Through the command line. Each layer is profiled on the outputs of the converted layers before it."""
    seen: list[torch.Tensor] = []

    def watched(mlp: GatedMLP, x_TD: torch.Tensor, config: RoutedConfig, options: ConvertOptions) -> RoutedMLP:
        seen.append(x_TD.clone())
        return cut_one(mlp, x_TD, config, options)

    monkeypatch.setattr(layer_pass, "cut_one", watched)
    command = ["convert", "--model", tiny_dense, "--out", tmp_path / "out", "--calibration", tiny_text]
    command += ["--experts", 8, "--shared", 3, "--active", 3, "--recipe", "cmoe-paper", "--sequence-length", 64]
    for name, value in method.items():
        command += ["--" + name.replace("_", "-"), value]
    assert main([str(part) for part in command]) == 0
    model = RoutedForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
    recipe = Recipe(**(vars(RECIPES["cmoe-paper"]) | method))
    for routed, mlp, x_TD in zip(model.routed_mlps, find_gated_mlps(dense), seen, strict=True):
        assert x_TD.shape == (8 * 64, 64)
        _hold(routed, mlp, x_TD, recipe, column)
    _layers_see_converted_ones(tmp_path / "out", tiny_text, seen)


@torch.no_grad()
def _layers_see_converted_ones(out: Path, text: Path, seen: list[torch.Tensor]) -> None:
    """What each layer was cut on is what it gets in the converted model."""
    model = RoutedForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    windows_SN = read_calibration((text,), tokenizer, 8, 64, 0, "stream").windows_SN
    got: list[torch.Tensor] = []
    for routed in model.routed_mlps:
        routed.register_forward_pre_hook(lambda _module, args: got.append(args[0].reshape(-1, 64)))
    model(windows_SN, use_cache=False)
    for ours, theirs in zip(got, seen, strict=True):
        close = (ours - theirs).abs().amax(dim=1) < 1e-3
        assert close.float().mean() > 0.99  # a near-tie in an earlier layer may part a few


def test_the_recipe_has_the_values_of_the_released_code():
    recipe = RECIPES["cmoe-paper"]
    assert (recipe.profile, recipe.marks_per_token, recipe.distance, recipe.max_iterations) == ("cosine", 10, "l1", 1)
    assert (recipe.clustering, recipe.shared_by) == ("marks", "rate")
    assert (recipe.gate, recipe.selection) == ("representative", "top_k")
    assert (recipe.samples, recipe.sequence_length, recipe.draw, recipe.seed) == (8, 2048, "stream", 0)


def test_windows_lie_anywhere_in_the_text_joined_by_blank_lines(tiny_dense: Path, tmp_path: Path):
    texts = [f"The {word} lay quiet before the storm." for word in ("harbour", "boy", "bread", "lamp", "pier")]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    stream = encode(tokenizer, "\n\n".join(texts), None)
    windows = read_calibration((path,), tokenizer, 8, 16, 0, "stream").windows_SN.tolist()
    assert len(windows) == 8
    starts = [next(i for i in range(len(stream)) if stream[i : i + 16] == window) for window in windows]
    assert len(set(starts)) > 4  # not every one from a document's start
