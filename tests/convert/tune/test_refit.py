"""The closed-form fit of down projections, against least squares and by what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.convert.domains.run import read_me
from pregate.convert.files.dense import load_dense
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import QUIET
from pregate.convert.text.batches import padded
from pregate.convert.tune import loop
from pregate.convert.tune.data import spaced_batches
from pregate.convert.tune.forward import TuningPass
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.outputs import path_offsets, path_scores, run_layers
from pregate.convert.tune.parameters import Trained, changing_tensors
from pregate.convert.tune.refit import REFIT_TOKENS, _fit, _fit_of, _Sums, refit, token_scale
from pregate.convert.tune.run import tune
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import decoder_layers, find_gated_mlps
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM
from tests.convert.domains.read_me_cases import small
from tests.convert.interruption import StopsAfter
from tests.convert.tune.tuning import tiny_options

ROWS = [list(range(1 + n, 200 + n)) for n in range(0, 310, 31)]


def load(path: Path) -> Any:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


def first_layer(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer 0 by the reference on ROWS: neurons that run and all of them [T, J], and the layer's own output [T, D]."""
    mlp, seen = model.routed_mlps[0], []
    hook = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.tensor(ROWS), use_cache=False)
    own = mlp(seen[0])  # by the policy of the pass it saw
    hook.remove()
    x = seen[0].reshape(-1, 64)
    ids_TK, _ = mlp.policy.choose(mlp, x)
    on = torch.zeros(len(x), 7).scatter_(1, ids_TK % 7, 1.0)[:, :6]  # -1 falls in column 6
    gate_up, _ = mlp.dense_weights()
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    h = mlp.act(gate) * up
    width = mlp.cut.shared_width
    mask = torch.cat([torch.ones(len(x), width), on.repeat_interleave(mlp.cut.expert_width, dim=1)], dim=1)
    return h * mask, h, own.reshape(-1, 64)


@pytest.mark.parametrize("kind", ["path", "layerwise"])
def test_it_is_the_least_squares_fit_of_the_dense_output(
    kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
):
    model = load(tiny_path_checkpoint if kind == "path" else tiny_layerwise_checkpoint)
    z, h, own = first_layer(model)
    _, down = model.routed_mlps[0].dense_weights()
    dense = h @ down.T
    state = model.get_input_embeddings()(torch.tensor(ROWS)).flatten(0, 1)
    scale = 1 / (state.square().sum(1, keepdim=True) + (own - dense).square().sum(1, keepdim=True)).sqrt()
    best = torch.linalg.lstsq((scale * z).double(), (scale * (dense - own)).double()).solution
    most = (scale * (own - dense)).square().sum()
    least = (scale * (z.double() @ best + own - dense)).square().sum() / most
    left = refit(model, ROWS, QUIET)
    assert left[0] == pytest.approx(least.item(), abs=0.02)  # the ridge keeps it a little above
    assert left[0] >= least - 1e-6
    refitted = first_layer(model)[2]
    measured = (scale * (refitted - dense)).square().sum() / most
    assert measured.item() == pytest.approx(left[0], rel=1e-3)
    assert max(left) < 0.93


def test_it_lowers_perplexity_and_moves_down_projections_alone(tiny_path_checkpoint: Path, tiny_dense: Path):
    model = load(tiny_path_checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refit(model, ROWS, QUIET)
    after = model.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert len(moved) == 6
    assert all(n.endswith("down_proj") for n in moved)
    dense = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint, dtype=torch.float32).eval()
    dense.path_router.thresholds.fill_(-torch.inf)  # every expert on
    text = [dense.generate(torch.tensor([[1, n]]), max_new_tokens=40, do_sample=False)[0].tolist() for n in (9, 40, 90)]
    assert score_rows(model, text).perplexity < score_rows(load(tiny_path_checkpoint), text).perplexity


def test_tokens_are_scaled_by_hand():
    """A token counts by its missing output's share of state and missing: no more, however large either is."""
    state, missing = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 7e6], [0, 0]])
    scale = token_scale(state, missing.double())
    assert scale[:2, 0].tolist() == pytest.approx([1 / 5, 1 / 7e6])
    assert (scale * missing)[:, 1].tolist() == pytest.approx([0.8, 1, 0])


@dataclass
class _WholePass(TuningPass):
    """As it was done before: the whole model up to layer `fitted`, for each layer anew."""

    fitted: int = 0
    first: int = 0
    real_BN: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        if mlp.layer < self.fitted:
            return super().forward(mlp, x_TD)
        if mlp.layer == self.fitted:
            z_TJ, missing_TD = _fit_of(mlp, x_TD[self.real_T], self._weights(mlp, x_TD, None)[self.real_T], None)
            scale_T1 = token_scale(self.states[mlp.layer].flatten(0, 1)[self.real_T], missing_TD)
            z_TJ, missing_TD = scale_T1 * z_TJ, scale_T1 * missing_TD
            rows_T = torch.arange(self.first, self.first + len(self.real_BN))[:, None].expand(self.real_BN.shape)
            chooses_T = (rows_T % 4 == 3)[self.real_BN]
            self.sums = [_Sums.of(z_TJ[part], missing_TD[part]) for part in (~chooses_T, chooses_T)]
        return torch.zeros_like(x_TD)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["path", "layerwise"])
def test_layer_by_layer_it_is_the_fit_of_whole_passes(
    kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
):
    path = tiny_path_checkpoint if kind == "path" else tiny_layerwise_checkpoint
    model, old, runs = load(path), load(path), []
    layers = decoder_layers(model.parent)
    hooks = [layer.register_forward_hook(lambda *_a, n=n: runs.append(n)) for n, layer in enumerate(layers)]
    left = refit(model, ROWS, QUIET)
    for hook in hooks:
        hook.remove()
    batches = spaced_batches(ROWS, REFIT_TOKENS)
    first, once = [0, 1, 2] * len(batches), len(batches)  # the first pass takes masks and positions
    assert runs[len(first) :] == [0] * 2 * once + [1] * 2 * once + [2] * once
    expected = []
    for mlp in old.routed_mlps:
        totals, first_row = [_Sums(*[torch.zeros((), dtype=torch.float64)] * 3)] * 2, 0
        for rows in batches:
            ids_BN, mask_BN = padded(rows)
            scores = path_scores(old, ids_BN)
            held = path_offsets(old, scores, ids_BN)
            real_BN = mask_BN.bool()
            fields: dict[str, Any] = {"fitted": mlp.layer, "first": first_row, "real_BN": real_BN}
            whole = _WholePass(old, real_BN.flatten(), scores, {}, held, **fields)
            first_row += len(rows)
            layer = decoder_layers(old.parent)[mlp.layer]

            def see(_layer: Any, args: tuple[torch.Tensor, ...], seen: Any = whole.states, n: int = mlp.layer) -> None:
                seen[n] = args[0]

            hook = layer.register_forward_pre_hook(see)
            run_layers(old, ids_BN, whole)
            hook.remove()
            totals = [total + found for total, found in zip(totals, whole.sums, strict=True)]
        expected.append(_fit(mlp, *totals))
    assert left == expected
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_ridge_is_the_one_that_text_not_fitted_with_calls_for():
    """Eight tokens and eight neurons: what is missing is noise to seven of them, and a fit to all of it is worth less
    than nothing on other tokens; where it is a sum of all neurons, the least ridge is best."""
    generator = torch.Generator().manual_seed(0)
    z_TJ, noise_TD = (torch.randn(12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for missing_TD, ridge in ((noise_TD, 10.0), (z_TJ @ noise_TD[:8], 1e-3)):
        fits, chooses = _Sums.of(z_TJ[:8], missing_TD[:8]), _Sums.of(z_TJ[8:], missing_TD[8:])
        mlp = SimpleNamespace(
            cut=SimpleNamespace(shared_width=2, num_routed=3),
            shared=SimpleNamespace(down_proj=torch.zeros(8, 2, dtype=torch.float64)),
            experts=SimpleNamespace(down_proj=torch.zeros(3, 8, 2, dtype=torch.float64)),
        )
        _fit(mlp, fits, chooses)  # pyright: ignore[reportArgumentType]
        change_JD = torch.cat([mlp.shared.down_proj, *mlp.experts.down_proj], dim=1).T
        torch.testing.assert_close(change_JD, (fits + chooses).solve(ridge))
        assert fits.left(fits.solve(1e-3)) < 0.05


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fit_that_harms_is_undone(
    method: Any, tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where validation is worse after it, the model is as it was; low-rank changes are of the parent's weights."""

    def harm(model: RoutedForCausalLM, *_: Any) -> list[float]:
        for name, tensor in changing_tensors(model, Trained({}, {}), True).items():
            if name.endswith("down_proj") or name.endswith("original"):
                tensor.normal_()
        return [0.9] * 3

    monkeypatch.setattr(loop, "refit", harm)
    options = tiny_options(tiny_path_checkpoint, tiny_text, tmp_path / "out", refit=True, method=method, steps=2)
    progress = StopsAfter(-1)
    figures = tune(replace(options, learning_rate=1e-9), progress).figures["tune"]
    assert not figures["refit"]["kept"]
    assert figures["refit"]["validation_perplexity"] > 1.1 * figures["validation_perplexity_before"]
    assert figures["validation_perplexity_after"] == pytest.approx(figures["validation_perplexity_before"], rel=1e-3)
    assert any("the fit is undone" in note for note in progress.notes)
    assert (options.out / "factors.safetensors").exists() == (method == "lora")


def test_layers_that_leave_nothing_out_stay(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    from pregate.convert.cut.conversion import convert
    from pregate.convert.cut.options import ConvertOptions

    convert(ConvertOptions(tiny_dense, tmp_path / "all", 8, 2, 6, (tiny_text,), samples=2, sequence_length=32))
    model = load(tmp_path / "all")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert refit(model, ROWS, QUIET) == []
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_where_experts_overlap_the_parent_tells_what_is_missing(
    tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path
):
    read_me(small(tiny_dense, tmp_path / "cut", domains, steps=0))
    model, parent = load(tmp_path / "cut"), load_dense(read_folder(tiny_dense))
    assert not model.is_partition
    ffn = find_gated_mlps(parent)[0].module

    def missing() -> float:
        seen: list[torch.Tensor] = []
        hook = model.routed_mlps[0].register_forward_hook(lambda _m, args, out: seen.extend((args[0], out)))
        model(torch.tensor(ROWS), use_cache=False)
        hook.remove()
        return (ffn(seen[0]) - seen[1]).square().sum().item()

    before = missing()
    left = refit(model, ROWS, QUIET, parent)
    assert missing() / before == pytest.approx(left[0], abs=0.05)  # the fit's own share is of scaled tokens
    assert max(left) < 0.93


@pytest.mark.parametrize("given", [True, False])
def test_overlapping_experts_are_tuned_after_a_fit_where_a_teacher_is_given(
    given: bool, tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path
):
    read_me(small(tiny_dense, tmp_path / "cut", domains, steps=0))
    fields: dict[str, Any] = {"teacher": tiny_dense} if given else {"kl_share": 0.0, "hidden_match": 0.0}
    options = TuneOptions(
        model=tmp_path / "cut", out=tmp_path / "out", text=domains, steps=1, sequence_length=64, device="cpu", **fields
    )
    progress = StopsAfter(-1)  # keeps its notes, and never stops
    figures = tune(options, progress).figures["tune"]
    assert ("refit" in figures) == given
    assert any("no fit in closed form" in note for note in progress.notes) != given
    if given:
        assert figures["refit"]["validation_perplexity"] < figures["validation_perplexity_before"]
