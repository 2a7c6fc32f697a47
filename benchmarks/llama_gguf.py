"""A Llama in bfloat16 as one GGUF file for llama.cpp, with the words of its SentencePiece tokenizer.

    python -m benchmarks.llama_gguf FOLDER TOKENIZER_FOLDER OUT.gguf      # needs `pip install gguf`

For measurements of speed: chat templates and the like are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from pregate.model.shard_file import ShardFile

_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(name: str) -> str:
    """llama.cpp's name of a tensor. Example: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    name = name.removesuffix(".weight")
    if name in _ENDS:
        return f"{_ENDS[name]}.weight"
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_OF_LAYER[part]}.weight"


def rotated(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp rotates them: neighbours in pairs, where transformers has halves."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def add_words(writer: Any, folder: Path, vocabulary: int) -> None:
    model = sentencepiece.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    words = [(p.piece.encode(), p.score, p.type) for p in model.pieces]
    words += [(f"<unused {n}>".encode(), -1000.0, gguf.TokenType.UNUSED) for n in range(len(words), vocabulary)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([word for word, _, _ in words])
    writer.add_token_scores([score for _, score, _ in words])
    writer.add_token_types([int(kind) for _, _, kind in words])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main(folder: Path, tokenizer_of: Path, out: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    writer: Any = gguf.GGUFWriter(out, "llama", use_temp_file=True)  # not all of it in memory
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_words(writer, tokenizer_of, config.vocab_size)
    for path in sorted(folder.glob("*.safetensors")):
        shard = ShardFile(path)
        for name in shard.tensors:
            weight = shard.read(name)
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                weight = rotated(weight, heads) if part in name else weight
            if weight.ndim == 1:
                writer.add_tensor(name_of(name), weight.float().numpy())
            else:
                data = weight.contiguous().view(torch.uint8).numpy().astype(np.uint8, copy=False)
                writer.add_tensor(name_of(name), data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
