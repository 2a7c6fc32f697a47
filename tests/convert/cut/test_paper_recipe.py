"""`--recipe cmoe-paper`, and the paper's text where it differs, held to an implementation written from the notes alone.

Many assignments of 0/1 columns are equally cheap; where they are, costs are compared and what follows is followed
from the split that was made. Everything else must be equal.

Shape letters: T tokens, D hidden width, I neurons of the dense FFN, R routed experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pregate.cli.main import main
from pregate.convert.cut import layer_pass
from pregate.convert.cut.cmoe import profile, representatives, shared_neurons, split_by_marks
from pregate.convert.cut.layer_cut import cut_one
from pregate.convert.cut.options import RECIPES, ConvertOptions, Recipe
from pregate.convert.text.calibration import encode, read_calibration
from pregate.kernels.reference import activation
from pregate.model import RoutedForCausalLM
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps
from pregate.model.layers import RoutedMLP
from tests.convert.cut import independent_cmoe as notes
from tests.convert.cut.paper_cuts import PAPER_TEXT, cut_by_recipe, float64, gated_mlp, groups_of, weights_of

METHODS = pytest.mark.parametrize(
    ("method", "column"), [({}, notes.RELEASED), (PAPER_TEXT, notes.PAPER)], ids=["released code", "paper's text"]
)
#: Below this a float32 and a float64 sum may choose differently: a tie.
TIE = 1e-6


def _hold(routed: RoutedMLP, mlp: GatedMLP, x_TD: torch.Tensor, options: Recipe, column: notes.Column) -> None:
    """Hold one cut layer to the notes: marks, rates, shared neurons, cost, representatives, choices, output."""
    gate, up, down = weights_of(mlp)
    x = float64(x_TD)
    marks_TI = _marks_agree(mlp, x_TD, options, column)
    cut = routed.cut
    split = notes.split_marks(marks_TI, cut.num_routed + cut.num_shared, cut.num_shared, column)
    shared, groups = groups_of(routed)
    assert shared == split.shared.tolist()
    assert sorted(sum(groups, shared)) == list(range(mlp.width))
    _costs_agree(mlp, x_TD, cut, options, column, marks_TI, groups)
    ours = _split_of(routed, split, marks_TI)
    ours = _with_representatives(ours, routed, mlp, marks_TI, column)
    _outputs_agree(routed, x_TD, ours, (x, gate, up, down), column)


def _marks_agree(mlp: GatedMLP, x_TD: torch.Tensor, options: Recipe, column: notes.Column) -> np.ndarray:
    gate, up, _ = weights_of(mlp)
    hidden_TI = notes.profile(float64(x_TD), gate, up, column)
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
    _, groups = groups_of(routed)
    labels_Q = np.array([next(e for e, group in enumerate(groups) if neuron in group) for neuron in split.routed])
    centroids_RT = notes.means(marks_TI[:, split.routed].T, labels_Q, len(groups))
    return notes.Split(split.rates_H, split.shared, split.routed, labels_Q, 0.0, centroids_RT, split.representatives_R)


def _with_representatives(
    split: notes.Split, routed: RoutedMLP, mlp: GatedMLP, marks_TI: np.ndarray, column: notes.Column
) -> notes.Split:
    """Who speaks for each expert is a member as near to the mean as any, and the gate has its rows."""
    gate, up, _ = weights_of(mlp)
    weight = float64(routed.get_parameter("paper_gate.weight"))
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
    assert np.allclose(float64(routed.gate(x_TD)), scores_TR, rtol=1e-4, atol=1e-5)
    generator = np.random.default_rng(1)
    for bias_std, scale_std in ((0.0, 0.0), (0.2, 0.5)):
        paper.balance_bias.copy_(torch.from_numpy(generator.normal(0, bias_std, num_routed)))
        paper.scale.copy_(torch.from_numpy(generator.normal(0, scale_std, num_routed)))
        bias, scale = float64(paper.balance_bias), float64(paper.scale)
        weights_TR = notes.choose(scores_TR, num_active, bias, scale)
        ranked = np.sort(notes.softmax(scores_TR) + bias, axis=1)[:, ::-1]
        clear = ranked[:, num_active - 1] - ranked[:, num_active] > TIE
        assert clear.mean() > 0.9
        ids = routed.gate.choose(x_TD).ids.numpy()
        theirs = np.stack([np.flatnonzero(row) for row in weights_TR])
        assert np.array_equal(ids[clear], theirs[clear])
        expected = notes.layer_output(x, gate, up, down, split, weights_TR)
        assert np.abs(float64(routed(x_TD)) - expected)[clear].max() < 1e-4 * np.abs(expected).max()
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
    mlp = gated_mlp(gate, up, torch.randn(12, 48, generator=generator))
    x_TD = 0.1 * torch.randn(150, 12, generator=generator)
    method = method | {"marks_per_token": 5}
    routed = cut_by_recipe(mlp, x_TD, counts, method)
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
    windows_SN = read_calibration((text,), tokenizer, 8, 64, 0, "stream").windows
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
    windows = read_calibration((path,), tokenizer, 8, 16, 0, "stream").windows.tolist()
    assert len(windows) == 8
    starts = [next(i for i in range(len(stream)) if stream[i : i + 16] == window) for window in windows]
    assert len(set(starts)) > 4  # not every one from a document's start
