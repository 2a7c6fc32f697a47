"""Finding a lean decoder's parts in a transformers model: by the names its modules go by and by what a probing forward
pass showed of them (`probe.py`), not by a list of families.

Whether the parts were understood is for a comparison to say (`family.py`), never for this file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from pregate.model.gated_mlp import decoder_layers
from pregate.router.engine.decoder import LeanDecoder, LeanLayer
from pregate.router.engine.linear import Linear, Norm
from pregate.router.engine.probe import Probe

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_PRE_NORMS = {"input_layernorm", "post_attention_layernorm"}
_FOUR_NORMS = _PRE_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


class NotLeanError(ValueError):
    """The model has a part whose meaning is not known here; the message names it."""


def lean_decoder(parent: Any, seen: Probe) -> LeanDecoder:
    """Return `parent`, a causal language model of transformers, as a lean decoder.

    Raises NotLeanError for what it has that is not known here. Without an error the parts of its layers are moved:
    `parent` cannot run any more.
    """
    base, layers = parent.base_model, decoder_layers(parent)
    norm, rotary = getattr(base, "norm", None), getattr(base, "rotary_emb", None)
    if norm is None or rotary is None:
        raise NotLeanError(f"a {type(base).__name__} without a last norm or a rotary embedding by the usual names")
    unlike = [type(layer).__name__ for layer in layers if type(layer) is not type(layers[0])]
    if unlike:
        raise NotLeanError(f"layers of several kinds, a {unlike[0]} among them")
    checked = [_check(index, layer, seen) for index, layer in enumerate(layers)]
    tables = [partial(rotary, **further) for further, _ in seen.rotary_calls]
    lean: list[LeanLayer] = []
    layer: Any
    for index, (layer, four_norms) in enumerate(zip(layers, checked, strict=True)):
        lean.append(_lean_layer(index, layer, four_norms, seen))
        layers[index] = nn.Identity()  # one layer at a time is held in both forms
    head = parent.get_output_embeddings()
    cap = getattr(parent.config, "final_logit_softcapping", None)
    return LeanDecoder(parent.get_input_embeddings(), tables, lean, Norm.of(norm), Linear(head.weight, head.bias), cap)


def _check(index: int, layer: nn.Module, seen: Probe) -> bool:
    """Whether the layer has four norms; NotLeanError for parts that are not known."""
    parts = {name for name, part in layer.named_children() if not isinstance(part, nn.Dropout)}
    norms = parts - {"self_attn", "mlp"}
    if norms not in (_PRE_NORMS, _FOUR_NORMS) or "self_attn" not in parts or "mlp" not in parts:
        raise NotLeanError(f"a {type(layer).__name__} of {', '.join(sorted(parts))}")
    attention: Any = layer.self_attn
    unknown = {name for name, _ in attention.named_children()} - _ATTENTION_PARTS
    unknown |= {name for name, _ in attention.named_parameters(recurse=False)}
    if unknown:
        raise NotLeanError(f"attention with {', '.join(sorted(unknown))}")
    if index not in seen.rules or index not in seen.rotary_of:
        raise NotLeanError("attention that reads no rotary table")
    query, key, value = seen.shapes[index]
    if not query[1] == key[1] == value[1]:
        raise NotLeanError("queries, keys and values of unlike widths")
    return norms == _FOUR_NORMS


def _lean_layer(index: int, layer: Any, four_norms: bool, seen: Probe) -> LeanLayer:
    attention, (heads, keys, _) = layer.self_attn, seen.shapes[index]
    names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    q_norm, k_norm = (_head_norm(getattr(attention, name, None), heads[1]) for name in ("q_norm", "k_norm"))
    ffn_norm = layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm
    return LeanLayer(
        input_norm=Norm.of(layer.input_layernorm),
        qkv=Linear.joined([getattr(attention, name) for name in names]),
        q_norm=q_norm,
        k_norm=k_norm,
        output=Linear(attention.o_proj.weight, attention.o_proj.bias),
        post_attention_norm=Norm.of(layer.post_attention_layernorm) if four_norms else None,
        ffn_norm=Norm.of(ffn_norm),
        ffn=layer.mlp,
        post_ffn_norm=Norm.of(layer.post_feedforward_layernorm) if four_norms else None,
        num_heads=(heads[0], keys[0]),
        head_width=heads[1],
        rotary=seen.rotary_of[index],
        rules=seen.rules[index],
    )


def _head_norm(norm: nn.Module | None, width: int) -> Norm | None:
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (width,):
        raise NotLeanError("a norm of all queries together")
    return Norm.of(norm)
