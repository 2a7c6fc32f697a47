"""Which tensors tuning changes, and which of them the optimizer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pregate.convert.tune.lora import add_low_rank
from pregate.convert.tune.options import TuningSettings
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.modeling import RoutedForCausalLM

_REFITTED = ("experts.down_proj", "shared.down_proj", "parametrizations.down_proj.original")
#: Tensors of routers and gates that are set, not learned (or learned and set).
_SET_PARTS = ("thresholds", "threshold", "balance_bias", "mass_threshold")


@dataclass(frozen=True)
class Trained:
    """Trained parameters by name: the model's own, and those of router or gates, which learn at another rate."""

    model: dict[str, nn.Parameter]
    router: dict[str, nn.Parameter]

    @property
    def all(self) -> dict[str, nn.Parameter]:
        return self.model | self.router


def choose_trained(model: Any, settings: TuningSettings) -> Trained:
    """Freeze `model` but for what `settings` asks to tune; with LoRA its weights get low-rank changes."""
    routed = isinstance(model, RoutedForCausalLM)
    router = _router_names(model, settings.router) if routed else []
    ffn = _ffn_names(model)
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    rest = [n for n in parameters if n not in ffn and not _of_a_router(n)] if settings.backbone else []
    if settings.method == "lora":
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        head = model.get_output_embeddings()
        linear -= {n for n in rest if head is not None and parameters[n] is head.weight}
        names = [n for n in parameters if n in ffn or (n in rest and n in linear)]
        own = add_low_rank(model, names, settings.rank, settings.alpha, settings.seed)
    else:
        own = {n: p for n, p in parameters.items() if n in ffn or n in rest}
    chosen = Trained(own, {n: parameters[n] for n in router})
    for parameter in chosen.all.values():
        parameter.requires_grad_(True)
    return chosen


def _of_a_router(name: str) -> bool:
    return not {"path_router", "linear_gate", "paper_gate"}.isdisjoint(name.split("."))


def _router_names(model: RoutedForCausalLM, wanted: bool) -> list[str]:
    """Parameters of the router in use; without `wanted` only the scales by which it weighs the experts it chose."""
    kind = "linear_gate" if model.config.gate == "linear" else "paper_gate"
    if model.config.routing == "path":
        kind = "path_router"
    names = [n for n, _ in model.named_parameters() if kind in n.split(".")]
    return names if wanted else [n for n in names if n.endswith(".scale")]


def _ffn_names(model: Any) -> set[str]:
    """Weights of a model's FFNs, cut or whole."""
    if isinstance(model, RoutedForCausalLM):
        parts = ("experts", "shared")
        owned = [m for mlp in model.routed_mlps for n, m in mlp.named_children() if n in parts]
    else:
        owned = [gated.module for gated in find_gated_mlps(model)]
    ids = {id(p) for module in owned for p in module.parameters()}
    return {n for n, p in model.named_parameters() if id(p) in ids}


def changing_tensors(model: Any, trained: Trained, refit: bool) -> dict[str, torch.Tensor]:
    """Every tensor that tuning may change, by name, where it lies: what a snapshot is of."""
    found: dict[str, torch.Tensor] = {n: p.data for n, p in trained.all.items()}
    if isinstance(model, RoutedForCausalLM):
        if refit:  # under LoRA these lie behind the low-rank changes
            found |= {n: p.data for n, p in model.named_parameters() if n.endswith(_REFITTED)}
        found |= {n: p.data for n, p in model.named_parameters() if _of_a_router(n) and n.endswith(".bias")}
        found |= {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in _SET_PARTS}
    return found


def optimizer_of(trained: Trained, settings: TuningSettings) -> torch.optim.AdamW:
    """AdamW with CMoE's betas; weight decay on weights alone, not on biases, norms and low-rank changes."""
    decays = settings.weight_decay if settings.method == "full" else 0.0
    groups = [
        {"params": [p for p in trained.model.values() if p.dim() > 1], "weight_decay": decays},
        {"params": [p for p in trained.model.values() if p.dim() <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained.router.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained.router.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rates = [settings.model_learning_rate] * 2 + [settings.router_learning_rate] * 2
    kept = [g | {"lr": rate, "initial_lr": rate} for g, rate in zip(groups, rates, strict=True) if g["params"]]
    return torch.optim.AdamW(kept, betas=(0.9, 0.95), fused=True)
