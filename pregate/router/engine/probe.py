"""What a probing forward pass of a transformers decoder shows of its layers: what each asks of attention, the shapes of
its keys and values, and which rotary table it reads.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from pregate.model.gated_mlp import decoder_layers
from pregate.router.engine.attention import AttentionRules

_PROBE = "pregate_probe"
HeadShape = tuple[int, int]


@dataclass
class Probe:
    """By layer: the shape (heads, width) of its queries, keys and values, its rules, and which of `rotary_calls` (the
    further arguments of a call of the rotary module, and its result) it was handed, if any."""

    shapes: dict[int, tuple[HeadShape, HeadShape, HeadShape]] = field(default_factory=dict)
    rules: dict[int, AttentionRules] = field(default_factory=dict)
    rotary_calls: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    rotary_of: dict[int, int] = field(default_factory=dict)

    @property
    def kv_shapes(self) -> list[tuple[HeadShape, HeadShape]]:
        """(heads, width) of every layer's keys and of its values."""
        return [self.shapes[layer][1:] for layer in range(len(self.shapes))]

    def attention(self, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple:
        layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        self.shapes[layer] = tuple((t.shape[1], t.shape[3]) for t in (query, key, value))  # pyright: ignore
        self.rules[layer] = AttentionRules.of(module, query.shape[-1], mask, **kwargs)
        batch, num_heads, num_tokens, _ = query.shape
        return query.new_zeros(batch, num_tokens, num_heads, value.shape[-1]), None

    def rotary(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        names = ("x", "position_ids", "layer_type")
        given = dict(zip(names, args, strict=False)) | kwargs
        self.rotary_calls.append(({k: v for k, v in given.items() if k not in names[:2]}, result))

    def handed(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = kwargs.get("position_embeddings")
        calls = [n for n, (_, result) in enumerate(self.rotary_calls) if result is found]
        if calls:
            self.rotary_of[layer] = calls[0]


def _pass(module: nn.Module, query: Any, *args: Any, pregate_probe: Probe, **kwargs: Any) -> tuple:
    return pregate_probe.attention(module, query, *args, **kwargs)


@torch.no_grad()
def probe(parent: Any) -> Probe:
    """Run two tokens through `parent`, a causal language model, and return what was seen.

    Raises UserError for attention that we do not know how to serve, and whatever the model itself does.
    """
    seen, rotary = Probe(), getattr(parent.base_model, "rotary_emb", None)
    AttentionInterface.register(_PROBE, _pass)
    before = parent.config._attn_implementation
    parent.set_attn_implementation(_PROBE)
    positions = torch.tensor([[0, 1]], device=parent.device)
    try:
        with ExitStack() as stack:
            if rotary is not None:
                stack.callback(rotary.register_forward_hook(seen.rotary, with_kwargs=True).remove)
            for index, layer in enumerate(decoder_layers(parent)):
                if isinstance(attention := getattr(layer, "self_attn", None), nn.Module):
                    hook = attention.register_forward_pre_hook(partial(seen.handed, index), with_kwargs=True)
                    stack.callback(hook.remove)
            parent(input_ids=positions, position_ids=positions, use_cache=False, pregate_probe=seen)
    finally:
        parent.set_attn_implementation(before)
    return seen
