"""The pass of tuning against the reference model: same routing, same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import QUIET
from pregate.convert.text.batches import padded
from pregate.convert.tune.balance import move_biases, set_thresholds
from pregate.convert.tune.data import TuningRows, read_rows
from pregate.convert.tune.forward import TuningPass, balance_term
from pregate.convert.tune.loop import Tuner
from pregate.convert.tune.options import TuningSettings
from pregate.convert.tune.outputs import hidden_error, path_offsets, path_scores, run_model
from pregate.convert.tune.run import dense_parent
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import decoder_layers
from pregate.model.layers import weighted_mass
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter
from tests.convert.tune.tuning import paper_checkpoint

ROWS = [[1, 7, 9, 11, 13, 40, 77, 205], [1, 44, 300], [1, 16, 18, 19, 20]]


def load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def paper(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paper_checkpoint(tiny_dense, tiny_text, tmp_path_factory.mktemp("paper") / "paper")


def with_router(model: RoutedForCausalLM, **shape: str) -> RoutedForCausalLM:
    """The model with a random path router of another shape, its weights, if learned, far from 1."""
    torch.manual_seed(0)
    config = replace(model.config.router_shape, **shape)
    model.path_router = PathRouter(config, 512, model.config.cuts, model.config.selection)
    if config.weights == "learned":
        model.path_router.scale.data.uniform_(0.5, 3)
    return model


@pytest.fixture(params=["layerwise", "path", "paper", "weighted"])
def model(request, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path, paper: Path) -> RoutedForCausalLM:
    folders = {"layerwise": tiny_layerwise_checkpoint, "paper": paper}
    found = load(folders.get(request.param, tiny_path_checkpoint))
    if request.param == "weighted":
        with_router(found, heads="recurrent", weights="learned")
    if request.param == "paper":
        for mlp in found.routed_mlps:
            mlp.paper_gate.scale.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
            mlp.paper_gate.balance_bias.uniform_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return found


def pass_of(model: RoutedForCausalLM, ids_BN, mask_BN, **gathered: bool) -> TuningPass:
    scores_TS = path_scores(model, ids_BN)
    held_T = path_offsets(model, scores_TS, ids_BN)
    return TuningPass(model, mask_BN.flatten().bool(), scores_TS, {}, held_T, **gathered)


@torch.no_grad()
def test_it_gives_what_the_reference_gives(model: RoutedForCausalLM):
    ids, mask = padded(ROWS)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = run_model(model, ids, pass_of(model, ids, mask, mass=True, balance=True)).logits.view(expected.shape)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert all(mlp.fast is None for mlp in model.routed_mlps)


@torch.no_grad()
def test_an_evaluation_is_the_one_protocol(model: RoutedForCausalLM, tiny_dense: Path, tiny_text: Path):
    rows = read_rows([tiny_text], AutoTokenizer.from_pretrained(tiny_dense), 64, 0.3, seed=0)
    tuner = Tuner(model, rows, TuningSettings(steps=1, kl_share=0))
    # The path router's thresholds are scores of this very text, so some tokens lie exactly on one: rounding decides.
    allowed = 2e-4 if model.path_router is not None else 1e-5
    assert tuner.evaluate().perplexity == pytest.approx(score_rows(model, rows.held_back).perplexity, rel=allowed)


@torch.no_grad()
def test_loads_and_active_neurons_are_counted_without_padding(tiny_layerwise_checkpoint: Path):
    model = load(tiny_layerwise_checkpoint)
    ids, mask = padded(ROWS)
    tuning_pass = pass_of(model, ids, mask)
    run_model(model, ids, tuning_pass)
    alone = [pass_of(model, *padded([row])) for row in ROWS]
    for row, single in zip(ROWS, alone, strict=True):
        run_model(model, torch.tensor([row]), single)
    for layer, loads in tuning_pass.loads.items():
        assert torch.equal(loads, torch.stack([single.loads[layer] for single in alone]).sum(dim=0))
    assert tuning_pass.active_neurons == sum(s.active_neurons for s in alone)
    assert tuning_pass.all_neurons == 16 * 3 * 128  # tokens, layers, FFN width


@torch.no_grad()
def test_the_masses_forecast_are_the_layers_own(tiny_layerwise_checkpoint: Path):
    """A gate that scores exactly the mass has error 0: so the error's target is the mass."""
    model: Any = load(tiny_layerwise_checkpoint)
    ids, mask = padded(ROWS)
    seen: dict[int, torch.Tensor] = {}
    for mlp in model.routed_mlps:
        mlp.linear_gate.forward = lambda x, mlp=mlp: seen.setdefault(mlp.layer, weighted_mass(mlp, x))
    tuning_pass = pass_of(model, ids, mask, mass=True)
    run_model(model, ids, tuning_pass)
    assert len(seen) == len(tuning_pass.mass_errors) == 3
    assert max(tuning_pass.mass_errors.values()) < 1e-8
    for mlp in model.routed_mlps:
        mlp.linear_gate.forward = lambda x, mlp=mlp: seen[mlp.layer].flip(1)
    again = pass_of(model, ids, mask, mass=True)
    run_model(model, ids, again)
    assert min(again.mass_errors.values()) > 0.1


def gradients(model: RoutedForCausalLM, again: bool, **gathered: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of a loss of all that a pass gives, the bytes kept for them, and how often a decoder layer ran."""
    ids, mask = padded(ROWS)
    held, runs = 0, 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.nbytes
        return tensor

    def count(*_args: Any) -> None:
        nonlocal runs
        runs += 1

    layers: Any = decoder_layers(model.parent)
    hooks = [layer.self_attn.register_forward_hook(count) for layer in layers]
    model.zero_grad()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tuning_pass = pass_of(model, ids, mask, **gathered)
        out = run_model(model, ids, tuning_pass, True, again)
        terms = [*tuning_pass.mass_errors.values(), *tuning_pass.balance_terms.values()]
        loss = out.logits.square().mean() + sum(h.square().mean() for h in out.hidden) + sum(terms)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert all(mlp.fast is None for mlp in model.routed_mlps)
    assert len(terms) == 3 * sum(gathered.values())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, held, runs


@pytest.mark.parametrize("gathered", [{}, {"mass": True, "balance": True}], ids=str)
def test_with_gradient_checkpointing_the_gradients_are_the_same(model: RoutedForCausalLM, gathered: dict[str, bool]):
    """Bit for bit, at less memory; every layer runs twice."""
    if model.config.gate == "representative":
        gathered = dict.fromkeys(gathered, False)  # its scores forecast no masses
    whole, held, runs = gradients(model, False, **gathered)
    found, less, twice = gradients(model, True, **gathered)
    assert len(whole) > 20
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert less < 0.5 * held
    assert (runs, twice) == (3, 6)


@pytest.mark.parametrize("kind", ["path", "layerwise"])
def test_at_rest_a_router_has_only_chosen_experts_computed(
    kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path
):
    """S2A2E8: four of eight parts of each FFN, and the same gradients as by computing all."""
    model = load(tiny_path_checkpoint if kind == "path" else tiny_layerwise_checkpoint)
    flops: list[int] = []

    def of(at_rest: bool) -> dict[str, torch.Tensor]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not at_rest or not {"path_router", "linear_gate"} & set(name.split(".")))
        with FlopCounterMode(display=False) as counter:
            found, _, _ = gradients(model, False)
        flops.append(counter.get_total_flops())
        return {n: g for n, g in found.items() if "router" not in n and "gate" not in n.split(".")[-2]}

    resting, learning = of(True), of(False)
    for name, gradient in resting.items():
        torch.testing.assert_close(gradient, learning[name], rtol=1e-3, atol=1e-6, msg=name)
    assert flops[0] < 0.8 * flops[1]


def test_balance_term_by_hand():
    assert balance_term(torch.tensor([3.0, 1.0]), torch.tensor([0.3, 0.1])).item() == pytest.approx(1.25)
    assert balance_term(torch.tensor([2.0, 2.0]), torch.tensor([0.1, 0.1])).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["path", "recurrent", "layerwise"])
def test_biases_make_the_load_even(kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path):
    model = load(tiny_layerwise_checkpoint if kind == "layerwise" else tiny_path_checkpoint)
    if kind == "recurrent":
        with_router(model, heads="recurrent")
    model.requires_grad_(False)
    ids, mask = padded([list(range(1, 250))])
    offsets: dict[int, torch.Tensor] = {}

    def imbalance() -> list[float]:
        tuning_pass = pass_of(model, ids, mask)
        run_model(model, ids, tuning_pass)
        move_biases(model, tuning_pass.loads, tuning_pass.spreads, 0.05, offsets)
        return [float(x.max() / x.mean()) for x in tuning_pass.loads.values()]

    first = imbalance()
    for _ in range(40):
        last = imbalance()
    assert max(first) > 1.3
    assert max(last) < 1.15
    assert all(offset.abs().max() > 0 for offset in offsets.values())


@pytest.mark.parametrize("shape", [{"heads": "single"}, {"gate": "dselect"}])
def test_a_router_without_biases_cannot_be_balanced_by_them(shape: dict[str, str], tiny_path_checkpoint: Path):
    model = with_router(load(tiny_path_checkpoint), **shape)
    with pytest.raises(UserError, match=r"balance bias: a path router with .* has no bias per expert"):
        Tuner(model, TuningRows(ROWS, ROWS), TuningSettings(steps=1, kl_share=0, balance="bias"))


@pytest.mark.parametrize("shape", [{"heads": "single"}, {"gate": "dselect"}, {"heads": "recurrent"}])
def test_a_router_of_any_shape_learns(shape: dict[str, str], tiny_path_checkpoint: Path):
    """Every parameter of its heads moves, and with learned weights their scale."""
    model = with_router(load(tiny_path_checkpoint), weights="learned", **shape)
    before = {n: p.detach().clone() for n, p in model.path_router.named_parameters()}
    tuner = Tuner(model, TuningRows(ROWS, ROWS), TuningSettings(steps=5, kl_share=0, batch_tokens=64))
    tuner.run()
    moved = {n for n, p in model.path_router.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys()


@pytest.mark.parametrize("kind", ["path", "layerwise"])
@torch.no_grad()
def test_thresholds_give_the_active_share(kind: str, tiny_layerwise_checkpoint: Path, tiny_path_checkpoint: Path):
    model = load(tiny_path_checkpoint if kind == "path" else tiny_layerwise_checkpoint)
    thresholds = (
        [model.path_router.thresholds] if kind == "path" else [m.linear_gate.threshold for m in model.routed_mlps]
    )
    for threshold in thresholds:
        threshold.add_(1)
    rows = [list(range(1 + n, 120 + n)) for n in range(0, 300, 30)]
    set_thresholds(model, rows, QUIET)
    ids, mask = padded(rows)
    tuning_pass = pass_of(model, ids, mask)
    run_model(model, ids, tuning_pass)
    assert tuning_pass.active_neurons / tuning_pass.all_neurons == pytest.approx(
        0.5, abs=5e-3
    )  # S2A2E8; thresholds follow the text


@torch.no_grad()
def test_the_dense_parent_is_the_dense_parent(tiny_dense: Path, tiny_path_checkpoint: Path):
    from pregate.convert.files.dense import load_dense

    ids = torch.tensor([list(range(1, 60))])
    parent = dense_parent(load(tiny_path_checkpoint))
    torch.testing.assert_close(
        parent(ids).logits, load_dense(read_folder(tiny_dense))(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_hidden_error_by_hand():
    real = torch.tensor([True, False])
    ours, theirs = torch.tensor([[1.0, 1.0], [9.0, 9.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert hidden_error((ours,), (theirs,), real).item() == pytest.approx(0.2)
    assert hidden_error((ours, theirs), (theirs, theirs), real).item() == pytest.approx(0.1)
    ours, theirs = torch.tensor([[1.0, 1.0], [900.0, 0.0]]), torch.tensor([[1.0, 2.0], [1000.0, 0.0]])
    assert hidden_error((ours,), (theirs,), torch.tensor([True, True])).item() == pytest.approx((0.2 + 0.01) / 2)


@torch.no_grad()
def test_with_every_expert_on_the_layers_are_the_parents(tiny_path_checkpoint: Path):
    """Outputs of layers are compared one by one: with thresholds that take all, they are the dense parent's."""
    model = load(tiny_path_checkpoint)
    ids, mask = padded(ROWS)
    theirs = run_model(dense_parent(model), ids, None, hidden=True)
    ours = run_model(model, ids, pass_of(model, ids, mask), hidden=True)
    assert len(ours.hidden) == len(theirs.hidden) == 3
    assert hidden_error(ours.hidden, theirs.hidden, mask.flatten().bool()) > 1e-2
    model.path_router.thresholds.fill_(-torch.inf)
    ours = run_model(model, ids, pass_of(model, ids, mask), hidden=True)
    assert hidden_error(ours.hidden, theirs.hidden, mask.flatten().bool()) < 1e-9
