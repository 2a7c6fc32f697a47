"""What transformers' Qwen2-MoE class can express of a routed checkpoint, and the config that says it.

The class: grouped-query attention with biases on q, k, v and none on the output, RMS norms before attention and FFN,
rotation of whole heads, SiLU; in every layer the same number of experts, a linear gate without bias, one shared
expert. vLLM's and SGLang's classes of that name read less of the config than transformers' does (read in their
sources): heads of hidden_size / num_attention_heads, no sliding window, mixtures in all layers, and SGLang an untied
head. So nothing else is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Qwen2MoeConfig

from pregate.base.errors import UserError
from pregate.convert.files.routed_shards import RoutedShards
from pregate.model.config import RoutedConfig, rope_sets

#: Families whose attention and norms the class computes.
FAMILIES = ("llama", "mistral", "phi3", "qwen2")
#: What the class lacks of other families.
_LACKS = {
    "gemma": "scaled embeddings and norms that add 1",
    "gemma2": "scaled embeddings, norms after each block and capped logits",
    "gemma3_text": "scaled embeddings, norms after each block and norms of queries and keys",
    "granite": "multipliers of embeddings, attention and residuals",
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), "norms after each block and norms of queries and keys"),
    "qwen3": "norms of queries and keys",
    **dict.fromkeys(("cohere", "cohere2"), "attention and FFN side by side"),
    "glm": "rotation of half a head",
    "smollm3": "layers without rotation",
}
_ROPES = ("default", "linear", "llama3", "yarn")


def check_expressible(source: RoutedShards) -> None:
    """UserError naming the first thing of the checkpoint that the class cannot express, and what to do."""
    _check_routing(source)
    _check_cuts(source)
    _check_parent(source)


def _refuse(source: RoutedShards, lacks: str, instead: str) -> UserError:
    return UserError.of("--format", "qwen2_moe", f"{source.folder}: the class has no {lacks}; {instead}")


def _check_routing(source: RoutedShards) -> None:
    config, again = source.config, "convert the dense model with --recipe stock"
    if config.routing != "layerwise":
        origin = source.manifest.source.get("layerwise", "the one it was decoupled from")
        raise _refuse(source, "path router (routing path)", f"allowed: a layer-wise checkpoint, as {origin}")
    if config.gate != "linear":
        raise _refuse(source, f"{config.gate} gate", again)
    if config.selection != "top_k":
        raise _refuse(source, "selection by threshold (each token has the same number of experts)", again)
    for index in range(source.num_layers):
        bias = source.ffn(index).bias
        if bias is not None and bias.any():
            raise _refuse(source, f"intercept in its gate (layer {index} has one)", again)


def _check_cuts(source: RoutedShards) -> None:
    cuts = source.config.cuts
    if len(set(cuts)) > 1:
        numbers = sorted({cut.num_shared for cut in cuts})
        raise _refuse(source, f"cut of its own for each layer (shared experts: {numbers})", "give --shared a number")
    if not cuts[0].num_active:
        raise _refuse(source, "layer in which no routed expert runs", "convert with --active 1 or more")
    if not cuts[0].num_shared:
        # transformers takes an empty shared expert, but vLLM's loader fails on its tensors.
        raise _refuse(source, "way to leave the shared expert out", "convert with --shared 1 or more")


def _check_parent(source: RoutedShards) -> None:
    parent = source.config.text_config
    if parent.model_type not in FAMILIES:
        lacks = _LACKS.get(parent.model_type, f"equivalent of the {parent.model_type} family")
        allowed = f"family {parent.model_type} needs that; allowed: {', '.join(FAMILIES)}"
        raise _refuse(source, lacks, allowed)
    if source.config.hidden_act != "silu":
        raise _refuse(source, f"activation {source.config.hidden_act} (in vLLM and SGLang)", "allowed: silu")
    if head_width(parent) * parent.num_attention_heads != parent.hidden_size:
        heads = f"heads {head_width(parent)} wide in {parent.num_attention_heads} heads over {parent.hidden_size}"
        raise _refuse(source, f"{heads} (in vLLM and SGLang)", "allowed: hidden_size / num_attention_heads")
    ropes = rope_sets(parent)
    if len(ropes) != 1 or ropes[0]["rope_type"] not in _ROPES:
        raise _refuse(source, f"rotation {ropes} that all engines agree on", f"allowed: {', '.join(_ROPES)}")
    if ropes[0].get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(source, "rotation of a part of a head", "allowed: partial_rotary_factor 1")
    if window_tokens(parent) and ropes[0]["rope_type"] == "yarn":
        raise _refuse(source, "sliding window", "allowed with rope_type yarn: none")


def head_width(parent: Any) -> int:
    """Width of one attention head."""
    return getattr(parent, "head_dim", None) or parent.hidden_size // parent.num_attention_heads


def window_tokens(parent: Any) -> int | None:
    """The sliding window of the parent's attention in tokens; None where every layer sees everything."""
    if parent.model_type == "qwen2" and "sliding_attention" not in parent.layer_types:
        return None
    return getattr(parent, "sliding_window", None)


def stock_config(config: RoutedConfig, dtype: str) -> Qwen2MoeConfig:
    """The Qwen2-MoE config of a checkpoint that `check_expressible` let through.

    Within its window a sliding attention is a full one, so a parent with a window gets a context of that length.
    """
    parent: Any = config.text_config
    cut = config.cuts[0]
    rope = {key: value for key, value in rope_sets(parent)[0].items() if key != "partial_rotary_factor"}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    stock = Qwen2MoeConfig(
        **{name: getattr(parent, name) for name in same},
        hidden_act="silu",
        max_position_embeddings=min(config.context_tokens, window_tokens(parent) or config.context_tokens),
        rope_parameters=rope,
        use_sliding_window=False,
        tie_word_embeddings=False,
        qkv_bias=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_experts=cut.num_routed,
        num_experts_per_tok=cut.num_active,
        norm_topk_prob=True,
        moe_intermediate_size=cut.expert_width,
        shared_expert_intermediate_size=cut.shared_width,
    )
    stock.architectures, stock.dtype = ["Qwen2MoeForCausalLM"], dtype
    return stock


def write_stock_config(stock: Qwen2MoeConfig, folder: Path) -> None:
    """Write config.json, with the rotation and the type once more under the names of transformers 4."""
    stock.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(fields["rope_parameters"])
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    fields["torch_dtype"] = fields["dtype"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
