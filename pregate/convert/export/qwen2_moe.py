"""The shards of a stock Qwen2-MoE folder, one layer at a time, under the names transformers' `save_pretrained` uses.

Shape letters: D hidden width, M expert width, R routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import shard_name
from pregate.convert.export.gate_scale import centred
from pregate.convert.export.stock_class import head_width
from pregate.convert.files.assembly import check_holds
from pregate.convert.files.routed_shards import CutFFN, RoutedShards
from pregate.convert.files.shards import write_index, write_shard
from pregate.convert.progress import Progress

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def write_qwen2_moe(
    source: RoutedShards, factors: list[float], folder: Path, dtype: torch.dtype, progress: Progress
) -> None:
    """Write shards and their index; `factors` shrink the layers' gates (`pregate.convert.export.gate_scale`).

    UserError for a tensor the class has no place for, and for a value `dtype` cannot hold.
    """
    last, num_active = source.num_layers, source.config.cuts[0].num_active
    with progress.stage("writing layers", last) as advance:
        for index, factor in enumerate(factors):
            start = f"{source.layers_name}.{index}."
            own = {name.removeprefix(start): tensor for name, tensor in source.layer(index).items()}
            tensors = attention_tensors(own, source) | ffn_tensors(source.ffn(index), factor, num_active)
            named = {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
            _save(named, folder / shard_name(index, last), dtype)
            advance(1)
    _save(outer_tensors(source.outer()), folder / shard_name(last, last), dtype)
    write_index(folder)


def ffn_tensors(ffn: CutFFN, factor: float, num_active: int) -> dict[str, torch.Tensor]:
    """The mixture of one layer: a shared expert under a gate of 0, routed ones under a shrunken gate.

    The sigmoid of 0 is 1/2, so the shared down-projection is doubled; each chosen expert weighs about 1/k, so the
    routed ones are `num_active` = k times as large.
    """
    assert ffn.shared is not None and ffn.experts is not None and ffn.gate is not None
    gate_up, down = ffn.shared
    gate, up = gate_up.chunk(2)
    found = {
        "mlp.gate.weight": centred(ffn.gate) * factor,
        "mlp.shared_expert_gate.weight": torch.zeros(1, ffn.gate.shape[1]),
        "mlp.shared_expert.gate_proj.weight": gate,
        "mlp.shared_expert.up_proj.weight": up,
        "mlp.shared_expert.down_proj.weight": 2 * down,
    }
    for expert, (gate_up, down) in enumerate(zip(*ffn.experts, strict=True)):
        gate, up = gate_up.chunk(2)
        found[f"mlp.experts.{expert}.gate_proj.weight"] = gate
        found[f"mlp.experts.{expert}.up_proj.weight"] = up
        found[f"mlp.experts.{expert}.down_proj.weight"] = num_active * down
    return found


def attention_tensors(own: Mapping[str, torch.Tensor], source: RoutedShards) -> dict[str, torch.Tensor]:
    """Attention and norms of one layer from the parent's: fused projections taken apart, biases of 0 where none are.

    UserError for a bias of the output projection that is not 0, and for any tensor left over.
    """
    left = dict(own)
    found = {name: left.pop(name) for name in (*_NORMS, "self_attn.o_proj.weight")}
    if "self_attn.qkv_proj.weight" in left:
        config: Any = source.config.text_config
        rows = [n * head_width(config) for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        for letter, part in zip("qkv", left.pop("self_attn.qkv_proj.weight").split(rows), strict=True):
            left[f"self_attn.{letter}_proj.weight"] = part
    for letter in "qkv":
        weight = left.pop(f"self_attn.{letter}_proj.weight")
        found[f"self_attn.{letter}_proj.weight"] = weight
        found[f"self_attn.{letter}_proj.bias"] = left.pop(f"self_attn.{letter}_proj.bias", torch.zeros(len(weight)))
    output_bias = left.pop("self_attn.o_proj.bias", torch.zeros(1))
    if output_bias.any():
        left["self_attn.o_proj.bias"] = output_bias
    if left:
        reason = f"{source.folder}: the class has no place for {min(left)}; export it as dense, or serve it by pregate"
        raise UserError.of("--format", "qwen2_moe", reason)
    return found


def outer_tensors(own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embedding, last norm and head; a tied head is written out, for SGLang's class knows no tying."""
    embedding = own.get("model.embed_tokens.weight", own.get("lm_head.weight"))
    assert embedding is not None
    head = own.get("lm_head.weight", embedding)
    return {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": own["model.norm.weight"],
        "lm_head.weight": head.clone(),
    }


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        check_holds(tensor, dtype, name)
    write_shard(cast, path)
