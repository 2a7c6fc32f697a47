"""Which tensors tuning changes, and which of them the optimizer does; low-rank changes of weights (LoRA, Hu et al.
2021), for matrices [A, B] and stacks of them [R, A, B].

Shape letters: R experts of a stack (none for a matrix), A rows, B columns, K rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pregate.base.errors import UserError
from pregate.convert.tune.options import TuningSettings
from pregate.model.factors import TABLE, changed
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.layers import GATE_PARTS
from pregate.model.modeling import RoutedForCausalLM

_REFITTED = ("experts.down_proj", "shared.down_proj", "parametrizations.down_proj.original")
#: Tensors of routers and gates that are set, not learned (or learned and set).
_SET_PARTS = ("thresholds", "threshold", "balance_bias", "mass_threshold", "share_control")


@dataclass(frozen=True)
class Trained:
    """Trained parameters by name: the model's own, and those of router or gates, which learn at another rate."""

    model: dict[str, nn.Parameter]
    router: dict[str, nn.Parameter]

    @property
    def all(self) -> dict[str, nn.Parameter]:
        return self.model | self.router


def choose_trained(model: Any, settings: TuningSettings) -> Trained:
    """Freeze `model` but for what `settings` asks to tune; with LoRA its weights get low-rank changes.

    Of the router in use, without `settings.router`, only the scales by which it weighs the experts it chose. Where the
    model's weights are kept a path router's table that is the parent's embedding times a projection stays that.
    UserError where nothing is left to train.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    router: list[str] = []
    if isinstance(model, RoutedForCausalLM):
        kind = "path_router" if model.config.routing == "path" else GATE_PARTS[model.config.gate]
        router = [n for n in parameters if kind in n.split(".") and (settings.router or n.endswith(".scale"))]
        made = {} if model.manifest is None else model.manifest.options.get("decouple", {})
        if settings.keeps_weights and made.get("embedding") == "parent":
            router = [n for n in router if n != TABLE]
        ffns = [m for mlp in model.routed_mlps for n, m in mlp.named_children() if n in ("experts", "shared")]
    else:
        ffns = [gated.module for gated in find_gated_mlps(model)]
    ids = {id(p) for module in ffns for p in module.parameters()}
    ffn = {n for n, p in parameters.items() if id(p) in ids}
    model.requires_grad_(False)
    rest = [n for n in parameters if n not in ffn and not _of_a_router(n)] if settings.backbone else []
    ffn = ffn if settings.ffn else set()
    if settings.method == "lora":
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        head = model.get_output_embeddings()
        linear -= {n for n in rest if head is not None and parameters[n] is head.weight}
        names = [n for n in parameters if n in ffn or (n in rest and n in linear)]
        own = add_low_rank(model, names, settings.rank, settings.alpha, settings.seed)
    else:
        own = {n: p for n, p in parameters.items() if n in ffn or n in rest}
    chosen = Trained(own, {n: parameters[n] for n in router})
    if not chosen.all:
        raise UserError(
            "--no-ffn, --no-backbone: nothing is left to tune; allowed: one of them, or a router that learns"
        )
    for parameter in chosen.all.values():
        parameter.requires_grad_(True)
    return chosen


def _of_a_router(name: str) -> bool:
    return not {"path_router", "linear_gate", "paper_gate"}.isdisjoint(name.split("."))


def changing_tensors(model: Any, trained: Trained, refit: bool) -> dict[str, torch.Tensor]:
    """Every tensor that tuning may change, by name, where it lies: what a snapshot is of."""
    found: dict[str, torch.Tensor] = {n: p.data for n, p in trained.all.items()}
    if isinstance(model, RoutedForCausalLM):
        if refit:  # under LoRA these lie behind the low-rank changes
            found |= {n: p.data for n, p in model.named_parameters() if n.endswith(_REFITTED)}
        found |= {n: p.data for n, p in model.named_parameters() if _of_a_router(n) and n.endswith(".bias")}
        found |= {n: b for n, b in model.named_buffers() if not set(n.split(".")).isdisjoint(_SET_PARTS)}
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


class LowRank(nn.Module):
    """W + `scaling` * up @ down; `up` [(R,) A, K] starts at 0, `down` [(R,) K, B] at random."""

    def __init__(self, weight: torch.Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scaling = scaling
        self.up = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.down = nn.Parameter(torch.randn(*stack, rank, columns).to(weight) / columns**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scaling * (self.up @ self.down)


def add_low_rank(model: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Give each weight of `model` named in `names` (2-D or 3-D) a trainable low-rank change and freeze the weight.

    Returns the new parameters by their names in `model`.
    """
    added: dict[str, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            change = LowRank(getattr(module, attribute).requires_grad_(False), rank, alpha / rank)
            parametrize.register_parametrization(module, attribute, change)
            prefix = f"{owner}.parametrizations.{attribute}.0.".removeprefix(".")
            added |= {prefix + part: parameter for part, parameter in change.named_parameters()}
    return added


@torch.no_grad()
def merge_low_rank(
    model: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Make every low-rank change part of the weight it changes; the model has its old tensor names again.

    Returns up and down of every weight by its name, `scaling` in up, as they counted: weights become what `changed`
    makes of them in `dtype`, bfloat16 where that has fewer bits than float32, so that who keeps them can merge again.
    """
    kept = torch.float32 if dtype == torch.float32 else torch.bfloat16
    merged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in list(model.named_modules()):
        for attribute in list(getattr(module, "parametrizations", {})):
            change: Any = module.parametrizations[attribute][0]  # pyright: ignore[reportIndexIssue]
            up, down = (change.scaling * change.up).to(kept), change.down.to(kept)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            weight = getattr(module, attribute)
            weight.data = changed(weight.data.to(dtype), up, down).to(weight.dtype)
            merged[f"{name}.{attribute}".removeprefix(".")] = (up.cpu(), down.cpu())
    return merged
