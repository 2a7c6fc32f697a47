"""Finding gated FFNs in a transformers decoder by their shape, not by class name.

A gated FFN computes down(act(gate(x)) * up(x)); here as two linear layers [I, D] and one [D, I], or one fused
[2I, D] (gate rows first) and one [D, I]. What was found is then checked against what the module computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pregate.base.errors import UserError
from pregate.kernels import reference

#: Largest difference that the order of addition makes, in units of the last place of the largest output (measured at
#: 3 in float32 for widths up to 8192; the two forms of GELU are 40 and more apart).
_CHECK_EPSILONS = 16


@dataclass(frozen=True)
class GatedMLP:
    """One decoder layer's gated FFN and where it hangs. Weights: `gate`/`up` [I, D], `down` [D, I]."""

    layer: int
    owner: nn.Module
    attribute: str
    module: nn.Module
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[1]

    @property
    def width(self) -> int:
        return self.gate.shape[0]

    def hidden(self, x_TD: torch.Tensor, act: reference.Activation) -> torch.Tensor:
        """h = act(x gate') * (x up') [T, I]; without a copy of the weights, unlike `reference.gated_hidden`."""
        return act(F.linear(x_TD, self.gate)) * F.linear(x_TD, self.up)

    def replace(self, new: nn.Module) -> None:
        """Hang `new` in the FFN's place."""
        setattr(self.owner, self.attribute, new)

    @torch.no_grad()
    def check(self, act: str) -> None:
        """Raise UserError unless the module computes down(act(gate x) * up x) on random rows.

        Only another order of addition is allowed for: the two forms of GELU differ by 5e-6 of the output at times.
        """
        x = torch.randn(3, self.hidden_size, generator=torch.Generator().manual_seed(0)).to(self.gate)
        ours = F.linear(self.hidden(x, reference.activation(act)), self.down)
        theirs = self.module(x[None])[0]
        allowed = _CHECK_EPSILONS * torch.finfo(theirs.dtype).eps * theirs.abs().max()
        if not (ours - theirs).abs().max() <= allowed:
            raise UserError(
                f"{type(self.module).__name__} in layer {self.layer} does not compute down(act(gate) * up) with the"
                f" activation {act!r} that its config names"
            )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layer list: the longest ModuleList of the model; UserError when there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of decoder layers found; not a decoder pregate can convert")
    return max(lists, key=len)


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Return every decoder layer's gated FFN; UserError names the family, and the module that is none."""
    family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    try:
        _refuse_mixture(model)
        return [find_gated_mlp(index, layer) for index, layer in enumerate(_text_layers(model))]
    except UserError as error:
        raise UserError(f"model family {family!r} cannot be converted: {error}") from error


def _text_layers(model: nn.Module) -> nn.ModuleList:
    config: Any = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        raise UserError(f"{type(model).__name__} is not a text decoder alone; allowed: models of text only")
    return decoder_layers(model)


def _refuse_mixture(model: nn.Module) -> None:
    """Raise UserError for a model that has experts already: a list called so, or weights stacked as [experts, ., .]."""
    for name, module in model.named_modules():
        attribute = name.rpartition(".")[2]
        stacked = any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
        is_list = isinstance(module, nn.ModuleList) and "expert" in attribute
        if is_list or (stacked and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)):
            raise UserError(f"{name} is a {type(module).__name__}: the model is a mixture already; allowed: dense ones")


def find_gated_mlp(index: int, layer: nn.Module) -> GatedMLP:
    """Return the gated FFN of decoder layer `index`; UserError names what it has instead."""
    seen: list[str] = []
    for attribute, module in layer.named_children():
        if "attn" in attribute.lower() or "attention" in attribute.lower():
            continue  # a fused QKV with half as many key heads has the shapes of a fused gated FFN
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        weights = _gated_weights(linears)
        if weights is not None:
            if any(m.bias is not None for m in linears.values()):
                raise UserError(
                    f"{type(module).__name__} in layer {index}: linear layers with biases are not supported"
                )
            return GatedMLP(index, layer, attribute, module, *weights)
        if "mlp" in attribute.lower() or "feed" in attribute.lower() or "ff" in attribute.lower():
            seen.append(f"{attribute} is a {type(module).__name__}")
    what = "; ".join(seen) or "no feed-forward module was recognised"
    raise UserError(
        f"layer {index} of {type(layer).__name__} has no gated FFN ({what}); allowed: FFNs that compute"
        " down(act(gate) * up) with linear layers, as Llama, Mistral and Qwen do"
    )


def _gated_weights(linears: dict[str, nn.Linear]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Match names to roles by shape; among the two [I, D] layers the one with "gate" in its name is the gate."""
    for down_name, down in linears.items():
        hidden, width = down.weight.shape
        others = {n: m.weight for n, m in linears.items() if n != down_name}
        pair = {n: w for n, w in others.items() if w.shape == (width, hidden)}
        gates = [n for n in pair if "gate" in n.lower()]
        named_down = width != hidden or "down" in down_name.lower()  # a square FFN leaves only the name to go by
        if len(pair) == 2 and len(gates) == 1 and named_down:
            up = next(n for n in pair if n != gates[0])
            return pair[gates[0]], pair[up], down.weight
        fused = [w for w in others.values() if w.shape == (2 * width, hidden)]
        if len(others) == 1 and fused:
            gate, up_rows = fused[0].chunk(2)
            return gate, up_rows, down.weight
    return None
